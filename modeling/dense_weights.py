"""Weights of transformers' dense ViT and DINOv2 under this model's names, and the configuration that fits them."""

import os
import re
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .configuration_bigbird_vit import BigBirdViTConfig

SOURCES = ("vit", "dinov2", "dinov2_with_registers")
SHARED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
)
# What is taken from the source but says nothing of its weights.
FREE = {"hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "drop_path_rate", "pooling"}
RENAMED = (
    (r"^embeddings\.patch_embeddings\.projection\.", "embeddings.projection."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.", r"encoder.layer.\1."),
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
    model, absent = (source, []) if isinstance(source, PreTrainedModel) else load_source(source, auto_class)
    _check_type(model.config)
    weights = _renamed(getattr(model, model.base_model_prefix, model).state_dict(), absent)
    fields = _fields(model.config, weights)
    if with_head:
        fields |= {"id2label": model.config.id2label, "label2id": model.config.label2id}
    for name in fields.keys() & changes.keys() - FREE:
        if changes[name] != fields[name]:
            raise ValueError(f"`{name}`: expected {fields[name]!r} as in the source, got {changes[name]!r}.")
    made = model_class(BigBirdViTConfig(**{**fields, "attention_type": "original_full", **changes}))
    if getattr(made, "pooler", None) is None:
        made.config.pooler_act = None
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}
    if with_head:
        weights = {f"{made.base_model_prefix}.{name}": tensor for name, tensor in weights.items()}
        head = getattr(model, "classifier", torch.nn.Identity())
        weights |= {f"classifier.{name}": tensor for name, tensor in head.state_dict().items()}
    expected = made.state_dict()
    weights |= {name: tensor for name, tensor in expected.items() if not tensor.numel()}  # no registers
    for name in sorted(expected.keys() | weights.keys()):
        found, wanted = (tuple(of[name].shape) if name in of else "none" for of in (weights, expected))
        if found != wanted:
            raise ValueError(f"`source`: expected tensor {name!r} {wanted} after renaming, got {found}.")
    made.load_state_dict(weights)
    return made.to(next(iter(weights.values())).dtype).eval()


def load_source(source: str | os.PathLike, auto_class: Any = AutoModel) -> tuple[PreTrainedModel, list[str]]:
    """Return the dense model in a folder or on the Hub, and the names of its tensors that are not in the files.

    Raises:
        ValueError: Another kind of model, damaged files or tensors of other shapes.
        OSError: No model there, or none in safetensors form.
    """
    _check_type(AutoConfig.from_pretrained(source))
    # without the bar and the table of missing and unexpected tensors: they are checked, and an error is one line
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, loading = auto_class.from_pretrained(source, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError):
        raise
    except Exception as error:  # of several types for damaged files and for tensors of other shapes
        raise ValueError(f"`source`: expected files with tensors that fit its configuration, got: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
    return model, sorted(loading["missing_keys"])


def _check_type(config: PreTrainedConfig) -> None:
    if config.model_type not in SOURCES:
        raise ValueError(f"`source`: expected a model of type {', '.join(SOURCES)}; got {config.model_type!r}.")


def _renamed(weights: dict[str, torch.Tensor], absent: list[str]) -> dict[str, torch.Tensor]:
    """The encoder's tensors that are there, under this model's names, without the mask token."""
    renamed = {}
    for name, tensor in weights.items():
        if name == "embeddings.mask_token" or any(f".{one}".endswith(f".{name}") for one in absent):
            continue
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
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
    fields = {name: getattr(config, name) for name in SHARED}
    fields |= {"position_embedding_type": "absolute", "pooling": "cls"}
    if "pooler.dense.weight" in weights:
        fields["pooler_act"] = config.pooler_act
    if config.model_type == "vit":
        return fields | {"intermediate_size": config.intermediate_size}
    width = int(config.hidden_size * config.mlp_ratio)
    return fields | {
        "intermediate_size": (int(width * 2 / 3) + 7) // 8 * 8 if config.use_swiglu_ffn else width,
        "use_swiglu_ffn": config.use_swiglu_ffn,
        "layerscale_value": config.layerscale_value,
        "drop_path_rate": config.drop_path_rate,
        "num_register_tokens": getattr(config, "num_register_tokens", 0),
        "interpolate_antialias": config.model_type == "dinov2_with_registers",
    }


__all__ = ["load_dense", "load_source"]
