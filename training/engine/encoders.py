"""How a run's encoders compute, by less memory, compiled or by another attention; and how little of them may learn."""

import copy
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file
from transformers import PreTrainedModel

from hf_vicreg.modeling.attention_timing import fastest_forms, use_forms
from hf_vicreg.modeling.modeling_bigbird_vit import IMPLEMENTATIONS, BigBirdViTModel
from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.training.engine.optim import layer_depths, num_layers
from hf_vicreg.training.errors import InputError, as_input_error

logger = logging.getLogger(__name__)

AUTO = "auto"  # of `attn_implementation`: `sdpa`, in the form that was the fastest
ADAPTER = "adapter"  # the folder of what low-rank adapters have learned, beside the whole model


def set_up_encoders(
    model: VicRegForPreTraining,
    *,
    gradient_checkpointing: bool,
    torch_compile: bool,
    attn_implementation: str = "sdpa",
    freeze_layers: int = 0,
    freeze_second: bool = False,
) -> None:
    """Let the encoders compute their layers again on the way back, compile them, or both; in place.

    With `freeze_layers` the first encoder keeps its embeddings and so many of its layers as they are, with
    `freeze_second` the second one everything.

    Names of weights stay those of encoders that are not compiled. Teachers are compiled as well. Expander and loss are
    left alone: they work on the batch of all processes.

    Raises:
        InputError: An encoder cannot compute its layers again, has no such implementation of attention or fewer
            layers; or `flex_attention`, which has no gradients on a CPU, is asked for without a GPU.
    """
    if attn_implementation not in (AUTO, *IMPLEMENTATIONS):
        known = ", ".join((AUTO, *IMPLEMENTATIONS))
        raise InputError(f"`attn_implementation`: expected one of {known}, got {attn_implementation!r}.")
    if attn_implementation == "flex_attention" and not torch.cuda.is_available():
        raise InputError(
            "`attn_implementation`: expected 'sdpa' or 'eager' for training on a CPU, got 'flex_attention', which has "
            "no backward pass there."
        )
    if freeze_layers:
        _freeze(model.encoder, freeze_layers)
    if freeze_second and model.second_encoder is not None:
        model.second_encoder.requires_grad_(False)
    for encoder in model.encoders:
        if attn_implementation not in (AUTO, "sdpa"):  # what every model has by itself, if it can
            with as_input_error("attn_implementation"):
                encoder.set_attn_implementation(attn_implementation)
        if gradient_checkpointing:
            # renamed between the oldest transformers we take and the newest
            renamed = hasattr(encoder, "activation_checkpointing_enable")
            name = "activation_checkpointing_enable" if renamed else "gradient_checkpointing_enable"
            with as_input_error("gradient_checkpointing"):
                getattr(encoder, name)({"use_reentrant": False})
        if torch_compile:
            logger.info("the encoder is compiled during the first step, which takes a minute or more")
            encoder.compile()
    if torch_compile:
        for teacher in (*model.objective.teachers, *getattr(model.objective, "kept", ())):
            teacher.compile()


def attention_of(asked: str | None, device: torch.device) -> str:
    """Return the implementation of attention that a run has on a device, where none may be asked for."""
    return asked or (AUTO if device.type == "cuda" else "sdpa")


def choose_forms(
    model: VicRegForPreTraining, sizes: dict[tuple[int, int], int], dtype: torch.dtype, accelerator: Accelerator
) -> dict[str, str]:
    """Return which form of attention is the fastest by grid, `ROWSxCOLUMNS`; the main process tries, all get the same.

    Every process must call. Encoders of other makers have no forms.

    Args:
        model: On its device.
        sizes: By (height, width) of the views in pixels, how many go through the encoder at once.
        dtype: Of autocast, or of the weights.
        accelerator: Its processes.
    """
    found: list[dict[str, str]] = [{}]
    if accelerator.is_main_process:
        for encoder in model.encoders:
            if isinstance(encoder, BigBirdViTModel):
                forms = fastest_forms(encoder, sizes, dtype)
                found[0] |= {f"{rows}x{columns}": form for (rows, columns), form in forms.items()}
    broadcast_object_list(found)
    return found[0]


def well_formed(forms: dict[str, str]) -> dict[str, str]:
    """Return forms as `choose_forms` does, none if a file has something else for them."""
    fine = all(re.fullmatch(r"\d+x\d+", grid) and isinstance(form, str) for grid, form in forms.items())
    return forms if fine else {}


def take_forms(model: VicRegForPreTraining, forms: dict[str, str]) -> None:
    """Let the encoders take what `choose_forms` returned; in place."""
    grids = {(int(rows), int(columns)): form for key, form in forms.items() for rows, columns in [key.split("x")]}
    for encoder in model.encoders:
        use_forms(encoder, grids)


def _freeze(encoder: PreTrainedModel, count: int) -> None:
    """Keep what lies before an encoder's layers, and so many of them, from learning."""
    depths, layers = layer_depths(encoder), num_layers(encoder)
    if count > layers:
        raise InputError(
            f"`freeze_layers`: expected at most {layers}, the layers of this {encoder.config.model_type}, got {count}."
        )
    for name, parameter in encoder.named_parameters():
        if depths[name] <= count:
            parameter.requires_grad_(False)


def add_adapters(encoder: PreTrainedModel, rank: int) -> None:
    """Freeze an encoder and add to each of its linear layers a product of two thin matrices, which learns; in place.

    The product is 0 at first, and counts as it is: `W x + B A x` with `A` `(rank, inputs)` and `B` `(outputs, rank)`.
    Source: Hu et al. 2021, LoRA (arXiv 2106.09685), as `peft` has it, with alpha = rank.

    Raises:
        InputError: `peft` is not installed, or the encoder has no linear layers.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.utils.error import NoMatchingPeftModuleError
    except ImportError as error:
        raise InputError(
            "`lora_rank`: expected the package `peft`, it is not installed; pip install 'hf-vicreg[adapters]'."
        ) from error
    try:
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"), encoder)
    except NoMatchingPeftModuleError as error:
        raise InputError(
            f"`lora_rank`: expected an encoder with linear layers, a {encoder.config.model_type!r} has none; leave it "
            "out."
        ) from error


@torch.no_grad()
def merge_adapters(model: torch.nn.Module, folder: Path | None = None, base: str | None = None) -> None:
    """Add what adapters have learned to the weights they belong to, and take the adapters out; in place.

    A model without adapters stays as it is.

    Args:
        model: With an encoder in it, or more, that `add_adapters` has changed.
        folder: Where the adapters of the first one are kept, as `peft` reads them; default: nowhere.
        base: What it says there of the model they were made for.
    """
    for encoder in [one for one in model.modules() if "peft_config" in vars(one)]:
        if folder is not None:
            _save_adapter(encoder, folder, base)
            folder = None
        for name, layer in list(_adapted(encoder)):
            layer.merge()
            owner, _, attribute = name.rpartition(".")
            setattr(encoder.get_submodule(owner), attribute, layer.get_base_layer())
        del encoder.peft_config
        encoder.requires_grad_(True)


def merged(encoder: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of an encoder with its adapters merged; the encoder itself where it has none."""
    if "peft_config" not in vars(encoder):
        return encoder
    encoder = copy.deepcopy(encoder)
    merge_adapters(encoder)
    return encoder


def _adapted(encoder: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, one) for name, one in encoder.named_modules() if isinstance(one, LoraLayer))


def _save_adapter(encoder: Any, folder: Path, base: str | None) -> None:
    from peft import get_peft_model_state_dict

    (config,) = encoder.peft_config.values()
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))
    weights = get_peft_model_state_dict(encoder, save_embedding_layers=False)
    # names as in the wrapper that peft puts around a model
    weights = {f"base_model.model.{name}": one.cpu().contiguous() for name, one in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
