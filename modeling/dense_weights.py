"""Weights of transformers' dense ViT, DINOv2 and DINOv3 under this model's names, and the configuration for them."""

import os
import re
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneMixin
from transformers.utils import logging

from .configuration_bigbird_vit import BigBirdViTConfig

SOURCES = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
SHARED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "initializer_range",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_channels",
)
# What is taken from the source but says nothing of its weights.
FREE = {
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "drop_path_rate",
    "pooling",
    "out_features",
    "apply_layernorm",
    "reshape_hidden_states",
    "problem_type",
    "id2label",
    "label2id",
}
# Beginnings of tensors in a checkpoint that are no part of an encoder, and so may be left out.
HEADS = ("classifier.", "decoder.", "pooler.")
RENAMED = (
    (r"^embeddings\.patch_embeddings\.(?:projection\.)?", "embeddings.projection."),
    (r"^(?:encoder\.layer|layers|(?:model\.)?layer)\.(\d+)\.", r"encoder.layer.\1."),
    (r"^norm\.", "layernorm."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    # DINOv2 in earlier releases of transformers
    (r"\.attention\.attention\.(query|key|value)\.", lambda found: f".attention.{found[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.mlp\.weights_out\.", ".mlp.down_proj."),
)


def load_dense(
    model_class: type[PreTrainedModel],
    source: str | os.PathLike | PreTrainedModel,
    changes: dict[str, Any],
    auto_class: Any = AutoModel,
) -> Any:
    """Return a model of `model_class` with the source's weights; `BigBirdViTModel.from_dense` says more.

    Args:
        model_class: The encoder, the backbone or the classifier.
        source: A dense model, or the folder or Hub id of one.
        changes: Fields of the configuration beside the source's.
        auto_class: What loads a source; `AutoModelForImageClassification` takes over its classifier as well.
    """
    with_head = auto_class is AutoModelForImageClassification
    model = source if isinstance(source, PreTrainedModel) else load_source(source, auto_class)
    _check_type(model.config)
    weights = _renamed(_encoder_of(model).state_dict())
    if issubclass(model_class, BackboneMixin):
        _check_maps(model.config)
    fields = _fields(model.config, weights)
    if with_head:
        fields |= {name: getattr(model.config, name) for name in ("id2label", "label2id", "problem_type")}
    known = {*BigBirdViTConfig().to_dict(), "num_labels"}
    for name, value in changes.items():
        if name not in known:
            raise ValueError(f"`{name}`: expected a field of BigBirdViTConfig.")
        if name in fields.keys() - FREE and _pair(value) != _pair(fields[name]):
            raise ValueError(f"`{name}`: expected {fields[name]!r} as in the source, got {value!r}.")
    if changes.keys() & {"out_features", "out_indices"}:
        fields.pop("out_features", None)
    made = model_class(BigBirdViTConfig(**{**fields, "attention_type": "original_full", **changes}))
    if getattr(made, "pooler", None) is None:
        made.config.pooler_act = None
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    if with_head:
        weights = {f"{made.base_model_prefix}.{name}": tensor for name, tensor in weights.items()}
        head = getattr(model, "classifier", torch.nn.Identity())
        weights |= {f"classifier.{name}": tensor for name, tensor in head.state_dict().items()}
    expected = made.state_dict()
    weights = {name: tensor for name, tensor in weights.items() if tensor.numel()}  # a source's empty registers
    for name in sorted(expected.keys() | weights.keys()):
        found, wanted = (tuple(of[name].shape) if name in of else "none" for of in (weights, expected))
        if found != wanted:
            raise ValueError(f"`source`: expected tensor {name!r} {wanted} after renaming, got {found}.")
    made.load_state_dict(weights)
    return made.to(next(iter(weights.values())).dtype).eval()


def load_source(source: str | os.PathLike, auto_class: Any = AutoModel) -> Any:
    """Return the dense model in a folder or on the Hub, without a pooler if its files have none; runs no code of it.

    Raises:
        ValueError: Another kind of model, damaged files, missing or unknown tensors or some of other shapes.
        OSError: No model there, or none in safetensors form.
    """
    _check_type(AutoConfig.from_pretrained(source, trust_remote_code=False))
    # without the bar and the table of missing and unexpected tensors: they are checked, and an error is one line
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, loading = auto_class.from_pretrained(
            source,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, MemoryError):
        raise
    except Exception as error:  # of several types, for damaged files and for configurations that make no model
        raise ValueError(
            f"`source`: expected weights and a configuration that load, got {type(error).__name__}: {error}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
    for name, found, wanted in sorted(loading["mismatched_keys"]):
        raise ValueError(
            f"`source`: expected tensor {name!r} {tuple(wanted)} by its configuration, got {tuple(found)}."
        )
    for name in sorted(loading["unexpected_keys"]):
        short = name.removeprefix(f"{model.base_model_prefix}.")
        if not short.startswith(HEADS) and short != "embeddings.mask_token":
            raise ValueError(f"`source`: expected no tensor {name!r} by its configuration, got one.")
    missing = sorted(loading["missing_keys"])
    if any(name.startswith("pooler.") for name in missing):
        model.pooler = None  # rather than random numbers
    for name in missing:
        if not name.startswith("pooler.") and name != "embeddings.mask_token":
            wanted = tuple(model.get_parameter(name).shape)
            raise ValueError(f"`source`: expected tensor {name!r} {wanted} by its configuration, got none.")
    return model


def _check_type(config: PreTrainedConfig) -> None:
    if config.model_type not in SOURCES:
        raise ValueError(f"`source`: expected a model of type {', '.join(SOURCES)}; got {config.model_type!r}.")


def _encoder_of(model: PreTrainedModel) -> torch.nn.Module:
    """The encoder of a model with a head, or the model itself; DINOv3's prefix names the stack of its layers."""
    return model if model.config.model_type == "dinov3_vit" else getattr(model, model.base_model_prefix, model)


def _check_maps(config: PreTrainedConfig) -> None:
    """Refuse backbones of DINOv3 whose maps are made otherwise: the last always normalised, rows without CLS."""
    for name in ("apply_layernorm", "reshape_hidden_states"):
        if config.model_type == "dinov3_vit" and not getattr(config, name):
            raise ValueError(f"`{name}`: expected True of a DINOv3 backbone, got {getattr(config, name)}.")


def _renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The encoder's tensors under this model's names, without the mask token."""
    renamed = {}
    gated = any(".mlp.gate_proj." in name or ".mlp.weights_in." in name for name in weights)
    for name, tensor in weights.items():
        if name == "embeddings.mask_token":
            continue
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        if not gated:
            name = name.replace(".mlp.up_proj.", ".mlp.fc1.").replace(".mlp.down_proj.", ".mlp.fc2.")
        if ".mlp.weights_in." in name:
            renamed[name.replace("weights_in", "gate_proj")], renamed[name.replace("weights_in", "up_proj")] = (
                tensor.chunk(2)
            )
        else:
            renamed[name] = tensor
    return renamed


def _fields(config: PreTrainedConfig, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The configuration's fields that a source decides."""
    if getattr(config, "head_dim", None) not in (None, config.hidden_size // config.num_attention_heads):
        raise ValueError(f"`head_dim`: expected `hidden_size / num_attention_heads`, got {config.head_dim}.")
    fields = {name: getattr(config, name) for name in SHARED} | {"pooling": "cls", "patch_stride": None}
    if getattr(config, "out_features", None):
        fields |= {
            name: getattr(config, name) for name in ("out_features", "apply_layernorm", "reshape_hidden_states")
        }
    if config.model_type == "dinov3_vit":
        return fields | _fields_of_dinov3(config)
    fields |= {name: getattr(config, name) for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")}
    fields |= {"position_embedding_type": "absolute", "qkv_bias": config.qkv_bias, "key_bias": True}
    if "pooler.dense.weight" in weights:
        fields["pooler_act"] = config.pooler_act
    if config.model_type == "vit":
        of_dinov2 = {"use_swiglu_ffn": False, "layerscale_value": None, "num_register_tokens": 0}
        return fields | of_dinov2 | {"intermediate_size": config.intermediate_size}
    width = int(config.hidden_size * config.mlp_ratio)
    return fields | {
        "intermediate_size": (int(width * 2 / 3) + 7) // 8 * 8 if config.use_swiglu_ffn else width,
        "use_swiglu_ffn": config.use_swiglu_ffn,
        "gate_act": "silu",
        "layerscale_value": config.layerscale_value,
        "drop_path_rate": config.drop_path_rate,
        "num_register_tokens": getattr(config, "num_register_tokens", 0),
        "interpolate_antialias": config.model_type == "dinov2_with_registers",
    }


def _fields_of_dinov3(config: PreTrainedConfig) -> dict[str, Any]:
    """What DINOv3 decides beside the shared fields; its shifts and stretches of positions in training are left out.

    Raises:
        ValueError: Linear layers without the biases that this model's have.
    """
    for name in ("proj_bias", "mlp_bias"):
        if not getattr(config, name):
            raise ValueError(f"`{name}`: expected True, as this model has it, got False.")
    query, key, value = config.query_bias, config.key_bias, config.value_bias
    if query != value or (key and not query):
        raise ValueError(
            "`query_bias`, `key_bias`, `value_bias`: expected queries and values alike, and a bias of keys beside "
            f"theirs alone, got {query}, {key}, {value}."
        )
    return {
        "position_embedding_type": "rope",
        "rope_theta": config.rope_theta,
        "qkv_bias": query,
        "key_bias": key or not query,  # without any bias it says nothing, and stays at its default
        "intermediate_size": config.intermediate_size,
        "use_swiglu_ffn": config.use_gated_mlp,
        "gate_act": config.hidden_act if config.use_gated_mlp else "silu",
        "layerscale_value": config.layerscale_value,
        "attention_probs_dropout_prob": config.attention_dropout,
        "drop_path_rate": config.drop_path_rate,
        "num_register_tokens": config.num_register_tokens,
    }


def _pair(value: Any) -> Any:
    """A size as (height, width), so that 32 and [32, 32] are equal; anything else as it is."""
    return (value, value) if type(value) is int else tuple(value) if isinstance(value, list) else value


__all__ = ["load_dense", "load_source"]
