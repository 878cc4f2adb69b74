"""A segmenter from a pretrained encoder: UperNet of transformers over `BigBirdViTBackbone`.

Why this one: it takes feature maps of one scale as they are and loads with `AutoModelForSemanticSegmentation`. DPT is
made for plain ViTs, but in transformers it takes a backbone of others for depth alone.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import (
    BaseImageProcessor,
    PreTrainedModel,
    SegformerImageProcessor,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from hf_vicreg.modeling.configuration_bigbird_vit import BigBirdViTConfig
from hf_vicreg.training.engine.encoders import add_adapters
from hf_vicreg.training.tasks.arguments import SegmentationArguments
from hf_vicreg.training.tasks.backbone import (
    canvas_size,
    normalised,
    pretrained_backbone,
    processor_of_encoder,
    ranges_of,
)
from hf_vicreg.training.tasks.segmentation.masks import IGNORED
from hf_vicreg.training.tasks.segmentation.windows import windowed_logits

BACKBONE = "backbone."
NUM_MAPS = 4  # layers whose feature maps are used, evenly spread; Xiao et al. take four stages
POOL_SCALES = (
    2,
    3,
    6,
)  # the authors' 1 leaves one number an image, of which a batch norm of one image has no variance


def build_segmenter(
    name: str, class_names: Sequence[str], arguments: SegmentationArguments
) -> UperNetForSemanticSegmentation:
    """Return a segmenter with the pretrained encoder's weights and all else new.

    Source: Xiao et al. 2018, UPerNet (arXiv 1807.10221).

    Args:
        name: Folder or Hub id of a BigBirdViT.
        class_names: One for each class index.
        arguments: Sizes of the new part.

    Raises:
        InputError: No model there, none of this architecture, or weights missing.
    """
    backbone = pretrained_backbone(name, arguments)
    config = backbone.config
    layers = config.num_hidden_layers
    config.set_output_features_output_indices(
        out_features=None, out_indices=sorted({-(-layers * part // NUM_MAPS) for part in range(1, NUM_MAPS + 1)})
    )
    segmenter = UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=config,
            hidden_size=arguments.decoder_hidden_size,
            pool_scales=POOL_SCALES,
            use_auxiliary_head=False,
            loss_ignore_index=IGNORED,
            id2label=dict(enumerate(class_names)),
            label2id={one: index for index, one in enumerate(class_names)},
        )
    )
    if not arguments.from_scratch:  # a configuration brings no weights
        segmenter.backbone.load_state_dict(backbone.state_dict())
    if arguments.lora_rank:
        add_adapters(segmenter.backbone, arguments.lora_rank)
    return segmenter


def learning_rate_scale(parameter: str, encoder_ratio: float) -> float:
    """Return the factor on the learning rate of a segmenter's parameter, by its name."""
    return encoder_ratio if parameter.startswith(BACKBONE) else 1.0


def build_segmenter_processor(name: str, config: BigBirdViTConfig, height: int, width: int) -> BaseImageProcessor:
    """Return a processor of the window's size, a whole number of patches, with the encoder's mean and deviation.

    transformers' own pipeline squashes an image into one window with it; `find_classes` takes as many as it needs. An
    encoder of channels other than 8-bit RGB keeps its own processor, which knows their ranges.

    Raises:
        InputError: A processor of other channels than the encoder.
    """
    height, width = canvas_size(config, height, width)
    own = processor_of_encoder(name, config)
    pretrained, size = own.to_dict(), {"height": height, "width": width}
    if ranges_of(own)[0] is not None:
        return type(own).from_dict(pretrained | {"size": size, "do_center_crop": False})
    return SegformerImageProcessor(
        size=size,
        image_mean=list(pretrained["image_mean"]),
        image_std=list(pretrained["image_std"]),
        do_reduce_labels=False,
    )


def pixels_of(image: Any) -> torch.Tensor:
    """Return the pixels `(channels, height, width)` of a picture or a `Raster`, uint8 or float32."""
    pixels = np.array(image)
    return torch.from_numpy(pixels if pixels.dtype == np.uint8 else pixels.astype(np.float32)).permute(2, 0, 1)


def model_inputs(processor: BaseImageProcessor, batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return what a segmenter takes of a batch: normalised, 0 outside the image, on the device."""
    pixels = normalised(processor, batch["pixels"].to(device, non_blocking=True))
    for one, (height, width) in zip(pixels, batch["sizes"], strict=True):
        one[:, height:], one[:, :, width:] = 0, 0
    return {"pixel_values": pixels, "labels": batch["classes"].to(device)}


@torch.no_grad()
def find_classes(
    segmenter: PreTrainedModel, processor: BaseImageProcessor, image: Any, batch_size: int = 8
) -> torch.Tensor:
    """Return the most likely class of each pixel, `(height, width)` int64 on the CPU, by windows at the image's scale.

    Args:
        segmenter: Set to evaluation mode.
        processor: Its image processor.
        image: A picture, or a `Raster` of the processor's channels; of any size.
        batch_size: Windows at once.
    """
    pixels = normalised(processor, pixels_of(image).to(segmenter.device))
    window = (processor.size["height"], processor.size["width"])
    segmenter.eval()
    return windowed_logits(partial(_logits, segmenter), pixels, window, batch_size).argmax(0).cpu()


def _logits(segmenter: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    logits = segmenter(pixel_values=pixels).logits
    return torch.nn.functional.interpolate(logits, pixels.shape[-2:], mode="bilinear", align_corners=False)
