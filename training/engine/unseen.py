"""Parameters that the loss cannot see: their gradient is 0, and what is computed for it is rounding noise.

AdamW divides a gradient by its own size and so turns noise into steps of full length: such a parameter walks at
random, differently for each number of processes, and a bias before the features shifts all of them. They are left out
of the optimiser. Found by structure:

- A bias whose output is the input of a batch norm over the batch, which takes the mean away. That is the bias of each
  of the expander's linear layers before a batch norm, and of the encoder's last layer norm: it shifts all features
  alike.
- The latter under an expander of one linear layer, too, if both views go through it: invariance, variance and
  covariance are made of differences. Not under an objective that sees such shifts. Under neither where the patches
  go to a decoder as well.
- A key's bias in softmax attention: it adds one number to all the scores of a query. Not with rotary positions, which
  turn it differently for each key.
"""

from torch import nn
from transformers import PreTrainedModel

from hf_vicreg.modeling.global_batch_norm import GlobalBatchNorm1d
from hf_vicreg.modeling.modeling_bigbird_vit import BigBirdViTModel
from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.modeling.vicreg_expander import VicRegExpander

# Types of encoders without rotary positions, whose layers of attention name their projections `q_proj` and `k_proj`,
# or `q_lin` and `k_lin`.
PLAIN_KEYS = {"distilbert", "vit", "deit", "dinov2", "dinov2_with_registers", "siglip_vision_model"}
# What adds one vector to the pooled features of all images, by type: they are the output of a norm, or a token or a
# mean of it; SigLIP's are a sum with the output of an MLP.
SHIFTS = dict.fromkeys(("dinov2", "dinov2_with_registers", "convnext", "convnextv2"), "layernorm.bias")
SHIFTS |= {"dinov3_vit": "norm.bias", "siglip_vision_model": "head.mlp.fc2.bias"}


def unseen_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return by name the parameters that the loss of a model cannot see.

    Args:
        model: The pretraining wrapper; of another model, whose loss may see shifts, only keys' biases are returned.
    """
    found: set[object] = set()
    for module in model.modules():
        if _has_plain_keys(module):
            for one in module.modules():
                key = getattr(one, "k_proj", getattr(one, "k_lin", None))
                if (
                    (hasattr(one, "q_proj") or hasattr(one, "q_lin"))
                    and isinstance(key, nn.Linear)
                    and key.bias is not None
                ):
                    found.add(key.bias)
    if isinstance(model, VicRegForPreTraining):
        for head in model.modules():  # expanders, and a predictor
            if isinstance(head, VicRegExpander):
                hidden = zip(head.hidden, head.norm, strict=True)
                found |= {linear.bias for linear, norm in hidden if isinstance(norm, GlobalBatchNorm1d)}
        expanders = [one for one in (model.expander, model.second_expander) if one is not None]
        for encoder, expander in zip(model.encoders, expanders, strict=True):
            of_differences = len(expanders) == 1 and not model.objective.sees_shifts
            if isinstance(expander.norm[0], GlobalBatchNorm1d) if len(expander.norm) else of_differences:
                bias = _shift_of_features(encoder)
                if bias is not None and not model.objective.encodes:
                    found.add(bias)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter in found and ".teacher." not in name  # which learns nothing anyway
    }


def _has_plain_keys(module: nn.Module) -> bool:
    if isinstance(module, BigBirdViTModel):
        return module.config.position_embedding_type != "rope"
    return isinstance(module, PreTrainedModel) and module.config.model_type in PLAIN_KEYS


def _shift_of_features(encoder: PreTrainedModel) -> nn.Parameter | None:
    """The parameter that adds one vector to the features of all images."""
    if isinstance(encoder, BigBirdViTModel):
        return encoder.layernorm.bias if encoder.pooler is None else None
    if encoder.config.model_type == "distilbert":
        return encoder.transformer.layer[-1].output_layer_norm.bias
    return dict(encoder.named_parameters()).get(SHIFTS.get(encoder.config.model_type, ""))


__all__ = ["unseen_parameters"]
