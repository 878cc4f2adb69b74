"""VICReg around an encoder, or two: two views in, the loss and its parts out."""

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple

from .byol import BYOL
from .call_checks import asks_for, check_keywords
from .configuration_bigbird_vit import BigBirdViTConfig
from .configuration_vicreg import VicRegConfig
from .contrastive_loss import FIRST_BIAS, FIRST_SCALE, MAX_SCALE, contrastive_loss
from .encoder_outputs import encoder_outputs, patch_grid, pooled_features
from .modeling_bigbird_mae import BigBirdViTMAEDecoder
from .modeling_bigbird_masked_image import BigBirdViTSimMIMHead
from .modeling_bigbird_vit import BigBirdViTModel
from .objective import View
from .objectives import build_objective, kinds_of
from .vicreg_expander import NoExpander, VicRegExpander
from .vicreg_loss import vicreg_loss
from .vicreg_statistics import share_sizes

logger = logging.get_logger(__name__)

PARAMETERS = (
    "pixel_values",
    "local_pixel_values",
    "second_inputs",
    "representations",
    "further",
    "geometry",
    "return_loss",
)


@dataclass
class VicRegOutput(ModelOutput):
    """What `VicRegForPreTraining` returns.

    Attributes:
        loss: Scalar, over the global batch; VICReg's is the weighted sum of the three parts.
        invariance: Scalar, unweighted; `None` from another objective or `pair_loss`, like the next two.
        variance: Scalar, unweighted.
        covariance: Scalar, unweighted.
        embeddings: `(batch, views, dimensions)`, the expander's output for each view, local ones last.
        representations: `(batch, views, features)`, the encoder's pooled output for each view; from two encoders, a
            tuple of two `(batch, features)`, or three with `image_pair_weight`, image, text and image.
        hidden_states: With `output_hidden_states`, for each view what the encoder returns as such, a tuple of layers.
        attentions: With `output_attentions`, likewise.
        further: Of an objective that needs more than pooled features, tensors with the batch first.
        parts: Of an objective other than VICReg: the parts of its loss by name, scalars.
        teacher_error: Scalar, unweighted; of VICReg with a teacher, see `taught.py`.
        image_pair: Scalar, unweighted; with `image_pair_weight`, VICReg's loss between two views of each image.
    """

    loss: torch.Tensor | None = None
    invariance: torch.Tensor | None = None
    variance: torch.Tensor | None = None
    covariance: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None
    representations: torch.Tensor | tuple[torch.Tensor, ...] | None = None
    hidden_states: tuple[tuple[torch.Tensor, ...], ...] | None = None
    attentions: tuple[tuple[torch.Tensor, ...], ...] | None = None
    further: tuple[torch.Tensor, ...] | None = None
    parts: dict[str, torch.Tensor] | None = None
    teacher_error: torch.Tensor | None = None
    image_pair: torch.Tensor | None = None


class VicRegForPreTraining(PreTrainedModel):
    """Any vision encoder, an expander and a loss; with a `second_encoder`, two branches sharing nothing.

    The loss is VICReg's, or that of another `objective` of the configuration.
    """

    config: VicRegConfig
    config_class = VicRegConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # for transformers' Trainer: the loss is a batch's own, not a sum over `num_items_in_batch`
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flex_attn = True  # where the encoder does

    def __init__(self, config: VicRegConfig):
        super().__init__(config)
        self.encoder = build_encoder(config.encoder)
        features = representation_size(config.encoder)
        self.expander: VicRegExpander | NoExpander = NoExpander(features)
        if any(kind.uses_expander for kind in kinds_of(config.objective)):
            self.expander = VicRegExpander(features, config.expander_sizes, config.expander_norm)
        self.second_encoder = self.second_expander = None
        if config.second_encoder is not None:
            self.second_encoder = build_encoder(config.second_encoder)
            sizes = config.second_expander_sizes or config.expander_sizes
            self.second_expander = VicRegExpander(
                representation_size(config.second_encoder), sizes, config.expander_norm
            )
        self.objective = build_objective(config, self.encoder, self.expander)
        if config.pair_loss != "vicreg" and config.second_encoder is None:
            raise ValueError(f"`pair_loss`: expected 'vicreg' without a `second_encoder`, got {config.pair_loss!r}.")
        self.logit_scale = self.logit_bias = None
        if config.pair_loss != "vicreg":
            self.logit_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE[config.pair_loss])))
        if config.pair_loss == "siglip":
            self.logit_bias = nn.Parameter(torch.tensor(FIRST_BIAS))
        self.loss_function = vicreg_loss  # transformers would take the class for a language model
        self.encoder_has_batch_norm = any(has_batch_norm(encoder) for encoder in self.encoders)
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
        if isinstance(module, BigBirdViTMAEDecoder | BigBirdViTSimMIMHead):
            init.trunc_normal_(module.mask_token, mean=0.0, std=self.config.encoder.initializer_range)
        if module is self and self.logit_scale is not None:
            init.constant_(self.logit_scale, math.log(FIRST_SCALE[self.config.pair_loss]))
            if self.logit_bias is not None:
                init.constant_(self.logit_bias, FIRST_BIAS)

    @property
    def encoders(self) -> list[PreTrainedModel]:
        """The encoder, or both of two branches."""
        return [one for one in (self.encoder, self.second_encoder) if one is not None]

    @property
    def branches(self) -> list[nn.Module]:
        """The encoders, and behind them their expanders."""
        return [*self.encoders, *(one for one in (self.expander, self.second_expander) if one is not None)]

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Return a stored wrapper; arguments and errors as for `PreTrainedModel`. A teacher learns by no gradient."""
        found = super().from_pretrained(*args, **kwargs)  # makes new parameters, all of which learn
        model = found[0] if isinstance(found, tuple) else found  # with `output_loading_info`
        for teacher in model.objective.modules():
            if isinstance(teacher, BYOL):
                teacher.teacher.requires_grad_(False)
        return found

    @classmethod
    def from_encoder_pretrained(
        cls, encoder: str | os.PathLike, second_encoder: str | os.PathLike | None = None, **fields
    ) -> "VicRegForPreTraining":
        """Return a wrapper around pretrained encoders, with new expanders.

        Args:
            encoder: Folder or Hub id of any vision encoder.
            second_encoder: Folder or Hub id of the second branch's.
            fields: Of `VicRegConfig`.

        Raises:
            OSError: No model there.
            ValueError: Bad fields.
        """
        loaded = [None if one is None else load_encoder(one) for one in (encoder, second_encoder)]
        configs = [None if one is None else one.config for one in loaded]
        model = cls(VicRegConfig(encoder=configs[0], second_encoder=configs[1], **fields))
        for own, given in zip((model.encoder, model.second_encoder), loaded, strict=True):
            if own is not None and given is not None:
                own.load_state_dict(given.state_dict())
        return model

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        local_pixel_values: torch.Tensor | None = None,
        second_inputs: dict[str, torch.Tensor] | None = None,
        representations: torch.Tensor | Sequence[torch.Tensor] | None = None,
        further: Sequence[torch.Tensor] = (),
        geometry: torch.Tensor | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> VicRegOutput:
        """Return the loss of a batch of images in two views each, or more.

        In training under a process group, loss and statistics are those of the global batch and every process must
        call; in evaluation they are this process's own. An encoder with batch norms of its own (ResNet) still
        normalises over each process's share, so that the result depends on the number of processes: a warning says so.
        Views of one size go through the encoder together, through one with batch norms each by itself; each goes
        through the expander by itself, so that BatchNorm statistics are those of one view, as in the authors' code.

        Args:
            pixel_values: `(batch, 2, channels, height, width)`, two views of each image. With `second_inputs`
                `(batch, channels, height, width)`, the first branch's; two views with `image_pair_weight` as well.
            local_pixel_values: `(batch, local views, channels, height, width)`, further, smaller crops of the images.
            second_inputs: What a second encoder takes where that is not an image of the same size: its
                `pixel_values`, or the inputs of another modality.
            representations: In place of images, what an earlier call returned as such; the encoder is left out.
            further: Beside them, what that call returned as such.
            geometry: `(batch, views, 6)`, where the views were cut out, of an objective with `needs_tokens`; see
                `objective.View`.
            return_loss: False leaves the expander out and returns representations alone. The two together take a batch
                through the encoder in pieces and through the loss as a whole.
            kwargs: `return_dict`, `output_hidden_states`, `output_attentions`.

        Raises:
            ValueError: Inputs of another shape, `second_inputs` without a second encoder, `local_pixel_values` with
                one, or fewer than two samples in the global batch.
            TypeError: A keyword that is none of these.
        """
        check_keywords(kwargs, PARAMETERS)
        recorded: dict[str, list] = {
            name: [] for name in ("hidden_states", "attentions") if asks_for(name, self.config, kwargs)
        }
        if representations is None:
            inputs = self._inputs(pixel_values, local_pixel_values, second_inputs)
            encoded, further = self._encode(inputs, geometry, recorded)
        elif pixel_values is None and local_pixel_values is None and second_inputs is None:
            encoded = self._given(representations)
        else:
            raise ValueError("`representations`: expected no images beside them, got some.")
        joined = torch.stack(encoded, dim=1) if self.second_encoder is None else tuple(encoded)
        states: dict[str, Any] = {name: tuple(of_views) or None for name, of_views in recorded.items()}
        if not return_loss:
            return VicRegOutput(representations=joined, further=tuple(further) or None, **states)
        group = self._process_group()
        num_samples = len(encoded[0])
        is_vicreg = self.config.objective == "vicreg"  # whose loss shares sizes itself
        may_differ = not self.objective.shares_are_equal
        if group is not None and may_differ and (self.config.expander_norm == "batch" or not is_vicreg):
            # before the expander's batch norms wait for each other: as many samples and views everywhere
            sizes = share_sizes([num_samples, len(encoded)], group, encoded[0].device)
            if any(size != sizes[0] for size in sizes):
                raise ValueError(f"`pixel_values`: expected as many samples and views on every process, got {sizes}.")
        if num_samples * (1 if group is None else dist.get_world_size(group)) < 2:
            raise ValueError(
                f"`pixel_values`: expected at least 2 samples for a covariance, got {num_samples}; "
                "raise the batch size."
            )
        expanders = [self.expander] * len(encoded)
        if self.second_expander is not None:
            expanders[1] = self.second_expander
        embeddings = [expander(one, group) for expander, one in zip(expanders, encoded, strict=True)]
        embedded = torch.stack(embeddings, dim=1)
        of_images: torch.Tensor | None = None
        added: torch.Tensor | float = 0.0
        if self.second_encoder is not None and len(embeddings) > 2:
            *embeddings, other = embeddings
            of_images = self._image_pair(embeddings[0], other, group)
            added = self.config.image_pair_weight * of_images
        states["image_pair"] = of_images
        if self.logit_scale is not None:
            z_a, z_b = embeddings
            loss = contrastive_loss(
                z_a,
                z_b,
                self.logit_scale,
                self.logit_bias,
                kind=self.config.pair_loss,
                process_group=group,
                equal_shares=self.objective.shares_are_equal,
            )
            return VicRegOutput(loss=loss + added, embeddings=embedded, representations=joined, **states)
        device = embeddings[0].device.type
        with contextlib.nullcontext() if is_vicreg else torch.autocast(device, enabled=False):
            loss, parts = self.objective(
                *(embeddings, further) if is_vicreg else (_full(embeddings), _full(further)), group
            )
        logged = parts if is_vicreg else {"parts": parts}
        return VicRegOutput(loss=loss + added, **logged, embeddings=embedded, representations=joined, **states)

    def _image_pair(self, one: torch.Tensor, other: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        """VICReg's loss of embeddings of two views of each image, with the weights of the images' branch."""
        weights: dict[str, Any] = dict(self.objective.weights)  # type: ignore[arg-type]
        for name in ("variance_weight", "covariance_weight"):
            weights[name] = weights[name][0] if isinstance(weights[name], list | tuple) else weights[name]
        equal = self.objective.shares_are_equal
        return vicreg_loss(one, other, process_group=group, equal_shares=equal, **weights).loss

    def encode(self, **inputs: Any) -> list[torch.Tensor]:
        """Return what the loss needs of some images, as tensors with the batch first; see `loss_of`.

        Args:
            inputs: Of `forward`.
        """
        outputs = self(**inputs, return_loss=False)
        found = outputs.representations
        views = found.unbind(1) if isinstance(found, torch.Tensor) else found
        return [*views, *(outputs.further or ())]

    def loss_of(self, features: Sequence[torch.Tensor]) -> VicRegOutput:
        """Return the output for the whole batch, from what `encode` returned of its pieces, joined."""
        objective = self.objective
        num_views = (len(features) - objective.further_per_image) // (1 + objective.further_per_view)
        return self(representations=features[:num_views], further=features[num_views:])

    def begin_step(self, step: int, num_steps: int) -> None:
        """Tell the objective which step of how many is about to begin, so that a resumed run does the same."""
        self.objective.begin_step(self, step, num_steps)

    def end_step(self) -> None:
        """Tell the objective that a step has changed the weights, and keep the scale of cosines where it can move."""
        if self.logit_scale is not None:
            with torch.no_grad():  # just below the largest: beyond it the loss has no gradient for the scale
                self.logit_scale.clamp_(max=math.log(MAX_SCALE) - 1e-6)
        self.objective.end_step(self)

    def _process_group(self) -> dist.ProcessGroup | None:
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return None
        several = dist.get_world_size() > 1
        if self.encoder_has_batch_norm and several and any(normalises_by_process(one) for one in self.encoders):
            logger.warning_once(
                "The encoder's own batch norms see one process's share of the batch: "
                "the result depends on the number of processes."
            )
        return dist.group.WORLD

    def _encode(
        self, inputs: list[dict[str, torch.Tensor]], geometry: torch.Tensor | None, recorded: dict[str, list]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Pooled features `(batch, features)` of each view, and what else the objective needs.

        Fills the lists of what is to be `recorded`.
        """
        if self.objective.encodes:
            return self.objective.encode(self.encoder, inputs)
        flags = {f"output_{name}": True for name in recorded}
        if self.second_encoder is not None:
            encoders = [self.encoder, self.second_encoder, self.encoder]
            batches = [(encoder, one, 1) for encoder, one in zip(encoders, inputs, strict=False)]
        elif self.encoder_has_batch_norm:
            batches = [(self.encoder, one, 1) for one in inputs]
        else:
            views = [one["pixel_values"] for one in inputs]
            batches = []
            for size in dict.fromkeys(view.shape for view in views):
                alike = [view for view in views if view.shape == size]
                batches.append((self.encoder, {"pixel_values": torch.cat(alike)}, len(alike)))
        encoded: list[torch.Tensor] = []
        tokens: list[torch.Tensor | None] = []
        for encoder, batch, num_views in batches:
            outputs = encoder_outputs(encoder, batch | flags)
            encoded += pooled_features(outputs, batch.get("attention_mask")).chunk(num_views)
            if self.objective.needs_tokens:
                size = batch["pixel_values"].shape[-2:]
                tokens += patch_grid(outputs.last_hidden_state, encoder.config, *size).chunk(num_views)
            for name, of_views in recorded.items():
                layers = [one.chunk(num_views) for one in getattr(outputs, name, None) or ()]
                of_views += [tuple(layer[view] for layer in layers) for view in range(num_views)]
        places = [None] * len(inputs) if geometry is None else geometry.unbind(1)
        maps = tokens or [None] * len(inputs)
        seen = [View(*one) for one in zip(inputs, maps, places, encoded, strict=True)]
        return encoded, self.objective.further(seen)

    def _given(self, representations: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Representations of an earlier call, one for each view."""
        if isinstance(representations, torch.Tensor):
            given = list(representations.unbind(1)) if representations.ndim == 3 else [representations]
        else:
            given = list(representations)
        widths = [self.expander.in_features] * max(2, len(given))
        if self.second_expander is not None:
            widths = [self.expander.in_features, self.second_expander.in_features]
            widths += [self.expander.in_features] * (len(given) == 3 and self.config.image_pair_weight > 0)
        expected = [(len(given[0]) if given else 0, width) for width in widths]
        if [tuple(one.shape) for one in given] != expected:
            raise ValueError(
                "`representations`: expected what an earlier call returned, (batch, features) of each view "
                f"{expected}, got {[tuple(one.shape) for one in given]}."
            )
        return given

    def _inputs(
        self,
        pixel_values: torch.Tensor | None,
        local_pixel_values: torch.Tensor | None,
        second_inputs: dict[str, torch.Tensor] | None,
    ) -> list[dict[str, torch.Tensor]]:
        """What the encoder takes for each view, local ones last."""
        found = None if pixel_values is None else tuple(pixel_values.shape)
        if local_pixel_values is not None:
            if self.second_encoder is not None:
                raise ValueError("`local_pixel_values`: expected one encoder for all views, got a `second_encoder`.")
            if local_pixel_values.ndim != 5 or pixel_values is None or len(local_pixel_values) != len(pixel_values):
                raise ValueError(
                    "`local_pixel_values`: expected (batch, local views, channels, height, width) beside "
                    f"`pixel_values` {found}, got {tuple(local_pixel_values.shape)}."
                )
        if second_inputs is None:
            if pixel_values is None or pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
                raise ValueError(f"`pixel_values`: expected (batch, 2 views, channels, height, width), got {found}.")
            local_views = () if local_pixel_values is None else local_pixel_values.unbind(1)
            return [{"pixel_values": view} for view in (*pixel_values.unbind(1), *local_views)]
        if self.second_encoder is None:
            raise ValueError("`second_inputs`: expected a `second_encoder` in the configuration, got none.")
        if self.config.image_pair_weight:
            if pixel_values is None or pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
                raise ValueError(
                    "`pixel_values`: expected (batch, 2 views, channels, height, width) with `image_pair_weight`, got "
                    f"{found}."
                )
            one, other = pixel_values.unbind(1)
            return [{"pixel_values": one}, second_inputs, {"pixel_values": other}]
        if pixel_values is None or pixel_values.ndim != 4:
            raise ValueError(
                f"`pixel_values`: expected (batch, channels, height, width) beside `second_inputs`, got {found}."
            )
        return [{"pixel_values": pixel_values}, second_inputs]


def _full(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors in float32 at least, whatever the autocast."""
    return [one.to(torch.promote_types(one.dtype, torch.float32)) for one in tensors]


def build_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """Return an encoder with new weights; the default one is a sibling, so that it needs no registration."""
    is_default = config.model_type == BigBirdViTConfig.model_type
    return BigBirdViTModel(config) if is_default else AutoModel.from_config(config)


def has_batch_norm(encoder: nn.Module) -> bool:
    """Return whether an encoder's output for an image depends on the others of the batch."""
    return any(isinstance(one, nn.modules.batchnorm._BatchNorm) for one in encoder.modules())


def normalises_by_process(encoder: nn.Module) -> bool:
    """Return whether an encoder's batch norms see one process's share alone, unlike `torch.nn.SyncBatchNorm`."""
    norms = [one for one in encoder.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    return any(not isinstance(one, nn.SyncBatchNorm) for one in norms)


def load_encoder(source: str | os.PathLike) -> PreTrainedModel:
    """Return a pretrained encoder from a folder or the Hub."""
    fields, _ = PreTrainedConfig.get_config_dict(source)
    is_default = fields.get("model_type") == BigBirdViTConfig.model_type
    return (BigBirdViTModel if is_default else AutoModel).from_pretrained(source, use_safetensors=True)


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


__all__ = ["VicRegExpander", "VicRegForPreTraining", "VicRegOutput", "has_batch_norm", "pooled_features"]
