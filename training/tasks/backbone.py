"""The pretrained encoder as the backbone of a task's model."""

from typing import Any, TypeVar

import torch
from accelerate.utils import set_seed
from huggingface_hub.errors import StrictDataclassError
from transformers import BaseImageProcessor

from hf_vicreg.modeling.channel_pixels import scaled
from hf_vicreg.modeling.configuration_bigbird_vit import BigBirdViTConfig
from hf_vicreg.modeling.configuration_vicreg import VicRegConfig
from hf_vicreg.modeling.modeling_bigbird_vit import BigBirdViTBackbone, BigBirdViTModel
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import load_config, load_processor, load_weights, public_name
from hf_vicreg.training.tasks.arguments import TaskArguments

Encoder = TypeVar("Encoder", bound=BigBirdViTModel)


def pretrained_backbone(name: str, arguments: TaskArguments) -> BigBirdViTBackbone:
    """Return an encoder that gives feature maps; see `pretrained_encoder`."""
    return pretrained_encoder(BigBirdViTBackbone, name, seed=arguments.seed, from_scratch=arguments.from_scratch)


def pretrained_encoder(kind: type[Encoder], name: str, *, seed: int, from_scratch: bool = False) -> Encoder:
    """Return an encoder with its weights, or of its configuration alone where it is trained from scratch.

    Args:
        kind: Its class.
        name: Folder or Hub id of a BigBirdViT.
        seed: Of new weights; it is set.
        from_scratch: Take the configuration alone where there are no weights.

    Raises:
        InputError: No model there, none of this architecture, or weights of the encoder missing.
    """
    config = load_config(name)
    if isinstance(config, VicRegConfig):
        raise InputError(f"`MODEL`: expected an encoder, {name} is the wrapper around one; give the run's folder.")
    if not isinstance(config, BigBirdViTConfig):
        raise InputError(f"`MODEL`: expected a model of type 'bigbird_vit', got {config.model_type!r}.")
    set_seed(seed)
    try:
        backbone, info = load_weights(kind, name)
    except (OSError, ValueError, StrictDataclassError) as error:
        if not from_scratch:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"`MODEL`: expected the folder or Hub id of a model in safetensors form, got {name!r}: {reason}"
            ) from error
        backbone, info = kind(config), {"missing_keys": []}
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(
            f"`MODEL`: expected weights for the whole encoder in {name}, found none for {missing[0]} and "
            f"{len(missing) - 1} more."
        )
    backbone.config.name_or_path = public_name(name)  # it is saved, and folders of this machine are nobody's business
    return backbone


def canvas_size(config: BigBirdViTConfig, height: int, width: int) -> tuple[int, int]:
    """Return the smallest (height, width) in pixels of at least the given one that patches cover without a rest."""
    height, width = (
        patch + stride * max(0, -(-(side - patch) // stride))
        for side, patch, stride in zip((height, width), config.patch_size_hw, config.patch_stride_hw, strict=True)
    )
    return height, width


def processor_of_encoder(name: str, config: BigBirdViTConfig) -> BaseImageProcessor:
    """Return the image processor that lies beside an encoder.

    Raises:
        InputError: One of other channels than the encoder.
    """
    processor = load_processor(name, config)
    low = ranges_of(processor)[0]
    channels = 3 if low is None else len(low)
    if channels != config.num_channels:
        raise InputError(
            f"`MODEL`: expected an image processor of {config.num_channels} channels beside the encoder, that of "
            f"{name} has {channels}; name the folder that a run left."
        )
    return processor


def normalised(processor: BaseImageProcessor, pixels: torch.Tensor) -> torch.Tensor:
    """Return pixels `(..., channels, height, width)`, uint8 if RGB, as the model takes them."""
    mean, std = (
        torch.tensor(values, device=pixels.device)[:, None, None]
        for values in (processor.image_mean, processor.image_std)
    )
    low = getattr(processor, "channel_low", None)
    shares = pixels.to(torch.float32) / 255 if low is None else scaled(pixels, low, processor.channel_high)
    return (shares - mean) / std


def ranges_of(processor: BaseImageProcessor) -> tuple[Any, Any]:
    """Return the values of each channel that become 0 and 1; None and None of RGB."""
    return getattr(processor, "channel_low", None), getattr(processor, "channel_high", None)
