"""A vision model to evaluate: any that transformers loads, with its image processor and what identifies it."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput
from transformers.utils import logging as transformers_logging

from hf_vicreg.model_cards.shipped import located, misnamed
from hf_vicreg.modeling.encoder_outputs import patch_grid
from hf_vicreg.modeling.image_processing_bigbird_vit import BigBirdViTImageProcessor
from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining, pooled_features
from hf_vicreg.modeling.modeling_vicreg_dual_encoder import VicRegDualEncoder
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.channels.channel_source import ChannelSource, as_channels
from hf_vicreg.training.images.image_source import ImageSource
from hf_vicreg.training.run.places import absence, is_shards, lacks_processor

logger = logging.getLogger(__name__)

FIRST_TOKEN, POOLED, MEAN_TOKEN = "first token", "pooler_output", "mean token"
BOOKKEEPING = {"transformers_version", "_name_or_path", "architectures", "dtype", "auto_map", "id2label", "label2id"}


@dataclass(frozen=True)
class VisionEncoder:
    """A model in evaluation mode, on its device, and its image processor.

    Attributes:
        name: Folder name or Hub id.
        model: The encoder.
        processor: Turns images into `pixel_values`.
        feature: What is taken for the feature of an image.
        weights: Hash of configuration and weights.
    """

    name: str
    model: PreTrainedModel
    processor: BaseImageProcessor
    feature: str
    weights: str

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return features `(batch, features)` of `pixel_values` `(batch, channels, height, width)`."""
        return self.feature_of(self.outputs(pixel_values))

    @torch.no_grad()
    def outputs(self, pixel_values: torch.Tensor, **also: bool) -> ModelOutput:
        """Return what the model makes of `pixel_values` `(batch, channels, height, width)`, on its device.

        Args:
            pixel_values: Of images.
            also: Such as `output_hidden_states`.
        """
        return self.model(pixel_values=pixel_values.to(self.model.device, non_blocking=True), **also)

    def feature_of(self, outputs: ModelOutput) -> torch.Tensor:
        """Return the features `(batch, features)` among the model's outputs."""
        return outputs.last_hidden_state[:, 0] if self.feature == FIRST_TOKEN else pooled_features(outputs)

    def inner_features(self, outputs: ModelOutput) -> list[torch.Tensor]:
        """Return the mean tokens `(batch, features)` after a third and two thirds of the layers; none without states.

        Of feature maps it is the mean over their places.
        """
        states = getattr(outputs, "hidden_states", None) or ()
        places = [max(1, round((len(states) - 1) * share / 3)) for share in (1, 2)] if len(states) > 1 else []
        return [states[one].flatten(2).mean(2) if states[one].ndim == 4 else states[one].mean(1) for one in places]

    def patch_tokens(self, outputs: ModelOutput, height: int, width: int) -> torch.Tensor:
        """Return the tokens of the patches `(batch, rows, columns, hidden_size)`, in raster order.

        Args:
            outputs: Of the model, for images of this size.
            height: Of the pixel values.
            width: Of the pixel values.

        Raises:
            InputError: The model has no token for each patch.
        """
        try:
            return patch_grid(outputs.last_hidden_state, self.model.config, height, width)
        except ValueError as error:
            raise InputError(f"`patch_tokens`: {error}, or leave it out.") from error

    @property
    def preprocessing(self) -> dict[str, Any]:
        """The image processor's settings, plain."""
        return json.loads(json.dumps(self.processor.to_dict(), sort_keys=True, default=str))

    def describe(self) -> dict[str, Any]:
        """Return what `results.json` says of the model."""
        return {
            "name": self.name,
            "model_type": self.model.config.model_type,
            "parameters": sum(one.numel() for one in self.model.parameters()),
            "weights": self.weights,
            "feature": self.feature,
            "preprocessing": self.preprocessing,
        }


class DualImages(VisionEncoder):
    """The images' side of a model of images and texts: features are embeddings that texts are compared with."""

    @torch.no_grad()
    def outputs(self, pixel_values: torch.Tensor, **also: bool) -> ModelOutput:
        """Return as `VisionEncoder.outputs`, the embedding as the pooled output; it gives no hidden states."""
        return self.model.get_image_features(pixel_values.to(self.model.device, non_blocking=True))


def load_vision_encoder(name: str, device: torch.device | None = None) -> VisionEncoder:
    """Return the encoder in a folder or on the Hub: of a run, of a run's `pretraining`, or of another maker.

    Some checkpoints (DINO's ViTs, classifiers) have no weights for the pooler that their class has; then the first
    token is the feature, not what random weights make of it.

    Args:
        name: Folder or Hub id.
        device: Where to; default: a GPU if there is one.

    Raises:
        InputError: No model there, no encoder of images, or weights missing.
    """
    config = load_config(name)
    try:
        if config.model_type == VicRegForPreTraining.config_class.model_type:
            wrapper, info = load_weights(VicRegForPreTraining, name)
            model: PreTrainedModel = wrapper.encoder
        else:
            model, info = load_weights(AutoModel, name)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise no_model(name, error) from error
    if model.main_input_name != "pixel_values":
        raise InputError(
            f"`MODEL`: expected a vision encoder, got a model of type {config.model_type!r}, whose input is "
            f"`{model.main_input_name}`; give the vision model alone."
        )
    missing = sorted(info["missing_keys"])
    in_pooler = [key for key in missing if "pooler" in key]
    if len(in_pooler) < len(missing):
        raise InputError(
            f"`MODEL`: expected weights for the whole encoder in {name}, found none for "
            f"{next(key for key in missing if key not in in_pooler)} and {len(missing) - 1} more."
        )
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    processor = load_processor(name, model.config)
    dual = config.model_type == VicRegDualEncoder.config_class.model_type
    encoder = (DualImages if dual else VisionEncoder)(public_name(name), model, processor, "", "")
    try:
        outputs = encoder.outputs(processor([plain_image(processor)], return_tensors="pt")["pixel_values"])
        pooled = getattr(outputs, "pooler_output", None)
        assert pooled_features(outputs).ndim == 2
    except Exception as error:  # whatever a model of another kind makes of an image
        raise InputError(
            f"`MODEL`: expected a vision encoder, but {name} of type {config.model_type!r} does not encode an image: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    feature = FIRST_TOKEN if in_pooler else MEAN_TOKEN if pooled is None else POOLED
    logger.info("features of %s: %s", name, feature)
    return replace(encoder, feature=feature, weights=weights_digest(model))


def plain_image(processor: BaseImageProcessor) -> Any:
    """Return a black image as an image processor takes it, of 64 pixels a side."""
    low = getattr(processor, "channel_low", None)
    return Image.new("RGB", (64, 64)) if low is None else np.zeros((len(low), 64, 64), np.uint8)


def source_for(processor: BaseImageProcessor, source: ImageSource) -> ImageSource:
    """Return images read as an image processor takes them: with all their channels, where it takes such."""
    low = getattr(processor, "channel_low", None)
    if low is None or isinstance(source, ChannelSource):
        return source
    return as_channels(source, len(low), getattr(processor, "pages", None))


def load_weights(model_class: Any, name: str, **config_fields: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return a model in full precision and what its checkpoint lacked, without transformers' own remarks on it.

    Raises:
        OSError: No safetensors there, or some that are damaged or of other shapes.
        ValueError: No such model class for this configuration.
    """
    with quiet_transformers():
        try:
            return model_class.from_pretrained(
                located(name),
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
                **config_fields,
            )
        except (SafetensorError, RuntimeError) as error:  # damaged, or of other shapes
            raise OSError(f"{type(error).__name__}: {error}") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from drawing bars and from remarks on heads and poolers, which are judged here."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def load_config(name: str, field: str = "MODEL") -> PreTrainedConfig:
    """Return a model's configuration. Code that lies beside it, or that it names, is not run; `field` named it.

    Raises:
        InputError: None there, or one that names code of others.
    """
    if absent := absence(name) or misnamed(name):  # not asked of the Hub
        raise InputError(f"`{field}`: expected the folder or Hub id of a vision model, got {name!r}{absent}")
    try:
        config = AutoConfig.from_pretrained(located(name), trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise no_model(name, error, field) from error
    for one in (config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))):
        if "/" in str(getattr(one, "_attn_implementation", None)):  # fetched from the Hub and run
            raise InputError(
                f"`{field}`: expected no code of others, the `attn_implementation` of {name} names some; take it out."
            )
    return config


def load_processor(name: str, config: PreTrainedConfig, field: str = "MODEL") -> BaseImageProcessor:
    """Return a model's image processor; where none is stored, ours at the model's image size, and says so.

    Args:
        name: Folder or Hub id.
        config: The model's.
        field: What named it, for errors.

    Raises:
        InputError: One that cannot be read, or the Hub does not say whether there is one.
    """
    try:
        return AutoImageProcessor.from_pretrained(located(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        if not lacks_processor(located(name), field):
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"`{field}`: the image processor of {name} cannot be read: {reason}") from error
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    logger.warning(
        "%s has no image processor: images are resized to %dx%d, ImageNet's mean and deviation", name, height, width
    )
    return BigBirdViTImageProcessor(size={"height": height, "width": width})


def weights_digest(model: PreTrainedModel) -> str:
    """Return a hash of a model's configuration and weights."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in BOOKKEEPING}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def public_name(name: str) -> str:
    """Return a Hub id as it is, of a folder its name alone: where it lies on this machine is nobody's business."""
    if "://" not in name and is_shards(name):
        return Path(name).name
    return Path(name).resolve().name if Path(name).exists() else name


def no_model(name: str, error: Exception, field: str = "MODEL") -> InputError:
    """Return what is said of a name without a model that can be loaded."""
    without = Path(name).is_dir() and not (Path(name) / "config.json").exists()
    reason = "it holds no config.json" if without else " ".join(str(error).split())[:300]
    return InputError(
        f"`{field}`: expected the folder or Hub id of a vision model in safetensors form, got {name!r}: {reason}"
    )
