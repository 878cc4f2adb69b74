"""A detector from a pretrained encoder: Deformable DETR of transformers over `BigBirdViTBackbone`.

Why this one: attention to a few points around where a query looks starts out local, and each class has a sigmoid of
its own, so small sets of images suffice where DETR needs hundreds of passes. It takes a single-scale encoder as it is.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import (
    BaseImageProcessor,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
    PreTrainedModel,
)

from hf_vicreg.modeling.configuration_bigbird_vit import BigBirdViTConfig
from hf_vicreg.training.engine.encoders import add_adapters
from hf_vicreg.training.images.channels.raster import arrays_of
from hf_vicreg.training.tasks.arguments import DetectionArguments
from hf_vicreg.training.tasks.backbone import canvas_size, pretrained_backbone, processor_of_encoder, ranges_of

logger = logging.getLogger(__name__)

BACKBONE = "model.backbone."
SLOW = ("sampling_offsets", "reference_points")  # Zhu et al.: a tenth of the learning rate
PRIOR = 0.01  # of an object, at the start; Lin et al. 2017 (arXiv 1708.02002), section 3.3
MAX_DETECTIONS = 100  # an image, as in COCO's own figures
FEATURE_LEVELS = 2  # the encoder's map and one of half its size


def build_detector(
    name: str, class_names: Sequence[str], arguments: DetectionArguments
) -> DeformableDetrForObjectDetection:
    """Return a detector with the pretrained encoder's weights and all else new.

    Boxes are refined from layer to layer. Source: Zhu et al. 2020, Deformable DETR (arXiv 2010.04159), section 4.2.

    Args:
        name: Folder or Hub id of a BigBirdViT.
        class_names: One for each class index.
        arguments: Sizes of the new part.

    Raises:
        InputError: No model there, none of this architecture, or weights of the encoder missing.
    """
    backbone = pretrained_backbone(name, arguments)
    detector = DeformableDetrForObjectDetection(
        DeformableDetrConfig(
            backbone_config=backbone.config,
            num_channels=backbone.config.num_channels,
            num_feature_levels=FEATURE_LEVELS,
            num_queries=arguments.num_queries,
            d_model=arguments.d_model,
            encoder_layers=arguments.encoder_layers,
            decoder_layers=arguments.decoder_layers,
            encoder_ffn_dim=4 * arguments.d_model,
            decoder_ffn_dim=4 * arguments.d_model,
            dropout=0.0,  # of few images and few steps, none to waste
            auxiliary_loss=True,
            with_box_refine=True,
            id2label=dict(enumerate(class_names)),
            label2id={one: index for index, one in enumerate(class_names)},
        )
    )
    if not arguments.from_scratch:  # a configuration brings no weights
        detector.model.backbone.model.load_state_dict(backbone.state_dict())
    if arguments.lora_rank:
        add_adapters(detector.model.backbone.model, arguments.lora_rank)
    start_as_authors(detector)
    detector.loss_function = finite_or_nan(detector.loss_function)
    return detector


def finite_or_nan(loss_function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a detector's loss that is NaN where predictions are not finite.

    That of transformers raises on them, on the process whose images they are, while the others wait; a loss of NaN is
    the guard's business.
    """

    def loss(logits, labels, device, pred_boxes, config, outputs_class, outputs_coord, **more):
        if outputs_class.isfinite().all() and outputs_coord.isfinite().all():
            return loss_function(logits, labels, device, pred_boxes, config, outputs_class, outputs_coord, **more)
        return (outputs_class.sum() + outputs_coord.sum()) * math.nan, {}, None

    return loss


@torch.no_grad()
def start_as_authors(detector: DeformableDetrForObjectDetection) -> None:
    """Draw a detector's new weights as the authors' code does.

    transformers draws queries so small that all of them look at the centre of the image, and that takes hundreds of
    steps to undo. Here they look everywhere, no class is likely, and boxes have one size around where they look.
    Source: github.com/fundamentalvision/Deformable-DETR, `models/deformable_detr.py` and `deformable_transformer.py`.
    """
    model = detector.model
    nn.init.normal_(model.query_position_embeddings.weight)
    for part in (model.input_proj, model.encoder, model.decoder):
        for name, weight in part.named_parameters():
            # the two of deformable attention start at 0, boxes have their own start below
            if weight.ndim > 1 and not any(one in name for one in ("sampling_offsets", "attention_weights", "embed")):
                nn.init.xavier_uniform_(weight)
    for classes in detector.class_embed:
        nn.init.constant_(classes.bias, -math.log((1 - PRIOR) / PRIOR))
    for boxes in detector.bbox_embed:
        nn.init.zeros_(boxes.layers[-1].weight)
        nn.init.zeros_(boxes.layers[-1].bias)
        boxes.layers[-1].bias[2:] = -2.0


@torch.no_grad()
def centre_features(detector: DeformableDetrForObjectDetection, inputs: dict[str, Any]) -> None:
    """Set the start of the projections so that what all patches have in common is taken out of the encoder's features.

    That can be nearly all of them: 95% of the mean square of an untrained encoder's. The norm behind a projection
    keeps it, and what tells one place from another drowns.

    Args:
        detector: Changed in place, in training mode afterwards.
        inputs: `pixel_values` `(batch, channels, height, width)` and `pixel_mask` `(batch, height, width)` of some
            images.
    """
    (features,) = detector.eval().model.backbone.model(inputs["pixel_values"]).feature_maps
    mask = nn.functional.interpolate(inputs["pixel_mask"][:, None].float(), size=features.shape[-2:])
    common = (features * mask).sum((0, 2, 3)) / mask.sum()
    for convolution, _ in detector.train().model.input_proj:
        convolution.bias.copy_(-convolution.weight.sum((2, 3)) @ common)


def learning_rate_scale(parameter: str, encoder_ratio: float) -> float:
    """Return the factor on the learning rate of a detector's parameter, by its name."""
    if parameter.startswith(BACKBONE):
        return encoder_ratio
    return 0.1 if any(part in parameter for part in SLOW) else 1.0


def build_detector_processor(name: str, config: BigBirdViTConfig, height: int, width: int) -> BaseImageProcessor:
    """Return the processor that fits images into `height` x `width` pixels, keeps their shape and pads the rest.

    Sizes that hold no whole number of patches are rounded up. Mean and deviation are those of the encoder's processor.
    An encoder of channels other than 8-bit RGB keeps its own processor, which knows their ranges.

    Raises:
        InputError: A processor of other channels than the encoder.
    """
    canvas = canvas_size(config, height, width)
    if canvas != (height, width):
        logger.info("images of %dx%d pixels instead of %dx%d: a whole number of patches", *canvas, height, width)
    own = processor_of_encoder(name, config)
    pretrained = own.to_dict()
    sizes: dict[str, Any] = {
        "size": {"max_height": canvas[0], "max_width": canvas[1]},
        "pad_size": {"height": canvas[0], "width": canvas[1]},
    }
    if ranges_of(own)[0] is not None:
        as_trained = {"do_pad": True, "do_center_crop": False, "resample": Image.Resampling.BILINEAR}
        return type(own).from_dict(pretrained | sizes | as_trained)
    return DeformableDetrImageProcessor(
        **sizes,
        image_mean=list(pretrained["image_mean"]),
        image_std=list(pretrained["image_std"]),
    )


@torch.no_grad()
def find_boxes(
    detector: PreTrainedModel, processor: BaseImageProcessor, images: Sequence[Any], *, threshold: float
) -> list[dict[str, torch.Tensor]]:
    """Return what any detector of transformers finds on each image, on the CPU, the best first.

    Args:
        detector: Set to evaluation mode.
        processor: Its image processor.
        images: Pictures, or `Raster`s of the processor's channels.
        threshold: Least score.

    Returns:
        For each image `scores` `(boxes,)`, `labels` `(boxes,)` and `boxes` `(boxes, 4)`: left, top, right, bottom in
        pixels of the image. At most 100.
    """
    given, axes = arrays_of(list(images))
    inputs = processor(given, return_tensors="pt", **axes).to(detector.device)
    outputs = detector.eval()(**inputs)
    sizes = [(image.height, image.width) for image in images]
    found = processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=sizes)
    best = [one["scores"].argsort(descending=True, stable=True)[:MAX_DETECTIONS] for one in found]
    return [
        {key: one[key][order].float().cpu() if key != "labels" else one[key][order].cpu() for key in one}
        for one, order in zip(found, best, strict=True)
    ]
