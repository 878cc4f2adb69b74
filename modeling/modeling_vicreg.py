"""VICReg around an encoder: two views in, the loss and its parts out."""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple

from .configuration_bigbird_vit import BigBirdViTConfig
from .configuration_vicreg import VicRegConfig
from .global_batch_norm import GlobalBatchNorm1d
from .modeling_bigbird_vit import BigBirdViTModel
from .vicreg_loss import vicreg_loss

logger = logging.get_logger(__name__)


@dataclass
class VicRegOutput(ModelOutput):
    """What `VicRegForPreTraining` returns.

    Attributes:
        loss: Scalar, the weighted sum of the three parts over the global batch.
        invariance: Scalar, unweighted.
        variance: Scalar, unweighted.
        covariance: Scalar, unweighted.
        embeddings: `(batch, 2, dimensions)`, the expander's output for both views.
        representations: `(batch, 2, features)`, the encoder's pooled output for both views.
    """

    loss: torch.Tensor | None = None
    invariance: torch.Tensor | None = None
    variance: torch.Tensor | None = None
    covariance: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None
    representations: torch.Tensor | None = None


class VicRegExpander(nn.Module):
    """MLP from representations to embeddings; used in pretraining only.

    Normalisation and ReLU after every layer but the last, which has no bias, as in the authors' code.
    """

    def __init__(self, in_features: int, config: VicRegConfig):
        super().__init__()
        self.in_features = in_features
        widths = [in_features, *config.expander_sizes]
        normalisation = GlobalBatchNorm1d if config.expander_norm == "batch" else nn.LayerNorm
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths[:-1]))
        self.norm = nn.ModuleList(normalisation(width) for width in widths[1:-1])
        self.output = nn.Linear(widths[-2], widths[-1], bias=False)

    def forward(self, representations: torch.Tensor, process_group: dist.ProcessGroup | None = None) -> torch.Tensor:
        """Return embeddings `(batch, dimensions)` of representations `(batch, features)` of one view."""
        states = representations
        for linear, norm in zip(self.hidden, self.norm, strict=True):
            states = linear(states)
            states = norm(states, process_group) if isinstance(norm, GlobalBatchNorm1d) else norm(states)
            states = states.relu()
        return self.output(states)


class VicRegForPreTraining(PreTrainedModel):
    """Any vision encoder, an expander and the VICReg loss."""

    config: VicRegConfig
    config_class = VicRegConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = (
        False  # transformers' Trainer: the loss is a batch's own, not a sum over `num_items_in_batch`
    )
    _supports_sdpa = True

    def __init__(self, config: VicRegConfig):
        super().__init__(config)
        encoder = config.encoder
        # the default encoder is a sibling, so that it needs no registration
        is_default = encoder.model_type == BigBirdViTConfig.model_type
        self.encoder = BigBirdViTModel(encoder) if is_default else AutoModel.from_config(encoder)
        self.expander = VicRegExpander(representation_size(encoder), config)
        self.encoder_has_batch_norm = any(
            isinstance(one, nn.modules.batchnorm._BatchNorm) for one in self.encoder.modules()
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # torch's default for linear layers, as in the authors' code; a ViT's small weights suit no BatchNorm MLP
        if isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.in_features)
                init.uniform_(module.bias, -bound, bound)

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor | None = None, **kwargs) -> VicRegOutput:
        """Return the loss of a batch of pairs of views.

        In training under a process group, loss and statistics are those of the global batch and every process must
        call; in evaluation they are this process's own. An encoder with batch norms of its own (ResNet) still
        normalises over each process's share, so that the result depends on the number of processes: a warning says so.
        Each view goes through encoder and expander by itself, so that BatchNorm statistics are those of one view, as
        in the authors' code.

        Args:
            pixel_values: `(batch, 2, channels, height, width)`, two views of each image.
            kwargs: `return_dict`; the rest is ignored.

        Raises:
            ValueError: `pixel_values` of another shape, or fewer than two samples in the global batch.
        """
        if pixel_values is None or pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
            found = None if pixel_values is None else tuple(pixel_values.shape)
            raise ValueError(f"`pixel_values`: expected (batch, 2 views, channels, height, width), got {found}.")
        in_group = self.training and dist.is_available() and dist.is_initialized()
        group = dist.group.WORLD if in_group else None
        if in_group and self.encoder_has_batch_norm and dist.get_world_size() > 1:
            logger.warning_once(
                "The encoder's own batch norms see one process's share of the batch: "
                "the result depends on the number of processes."
            )
        if len(pixel_values) * (dist.get_world_size() if in_group else 1) < 2:
            raise ValueError(
                f"`pixel_values`: expected at least 2 samples for a covariance, got {len(pixel_values)}; "
                "raise the batch size."
            )
        representations = [pooled_features(self.encoder(view)) for view in pixel_values.unbind(1)]
        z_a, z_b = (self.expander(view, group) for view in representations)
        parts = vicreg_loss(
            z_a,
            z_b,
            invariance_weight=self.config.invariance_weight,
            variance_weight=self.config.variance_weight,
            covariance_weight=self.config.covariance_weight,
            gamma=self.config.gamma,
            eps=self.config.eps,
            process_group=group,
        )
        return VicRegOutput(
            **parts._asdict(),
            embeddings=torch.stack([z_a, z_b], dim=1),
            representations=torch.stack(representations, dim=1),
        )


def pooled_features(outputs: ModelOutput) -> torch.Tensor:
    """Return `(batch, features)` from a vision encoder's output: its pooled output, or its mean token without one."""
    pooled = getattr(outputs, "pooler_output", None)
    return outputs.last_hidden_state.mean(1) if pooled is None else pooled.flatten(1)


def representation_size(config) -> int:
    """Return the width of a vision encoder's pooled output from its configuration.

    Raises:
        ValueError: The configuration names no width.
    """
    for name in ("hidden_size", "hidden_sizes"):
        value = getattr(config, name, None)
        if value:
            return value if isinstance(value, int) else value[-1]
    raise ValueError(f"`encoder`: expected a config with `hidden_size` or `hidden_sizes`, got {config.model_type!r}.")


__all__ = ["VicRegExpander", "VicRegForPreTraining", "VicRegOutput", "pooled_features"]
