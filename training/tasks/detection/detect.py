"""`hf-vicreg detect`: what a detector finds on images, as lines and as pictures."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForObjectDetection

from hf_vicreg.model_cards.escaping import one_line
from hf_vicreg.modeling.channel_pixels import ChannelPixelsMixin
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import load_config, load_processor, load_weights, source_for
from hf_vicreg.training.images.channels.raster import as_picture
from hf_vicreg.training.images.sources import ImageSource
from hf_vicreg.training.tasks.backbone import ranges_of
from hf_vicreg.training.tasks.detection.box_drawing import draw_found
from hf_vicreg.training.tasks.detection.model import find_boxes


def detect(model_name: str, images: Sequence[str], output: str | None, threshold: float) -> None:
    """Print a line for each object found and, with `output`, write each image with its boxes.

    Args:
        model_name: Folder or Hub id of any detector of transformers.
        images: Image files; files of science for a model of such channels.
        output: Folder for `NAME.png`, or None.
        threshold: Least score, from 0 to 1.

    Raises:
        InputError: No detector, no images, or two images whose pictures would have one name; nothing is written.
    """
    if not 0 <= threshold <= 1:
        raise InputError(f"`threshold`: expected a number from 0 to 1, got {threshold}.")
    names = [Path(path).stem for path in images]
    twice = next((name for name in names if names.count(name) > 1), None)
    if output is not None and twice is not None:
        raise InputError(f"`IMAGE`: expected names that differ, found several of {twice!r}; draw them one at a time.")
    missing = next((path for path in images if not os.path.exists(path)), None)
    if missing is not None:
        raise InputError(f"`IMAGE`: expected image files, cannot read {missing}: there is none.")
    config = load_config(model_name)
    try:
        detector, info = load_weights(AutoModelForObjectDetection, model_name)
    except (OSError, ValueError, ImportError, StrictDataclassError) as error:  # ImportError: a backbone of timm's
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"`MODEL`: expected the folder or Hub id of a detector, as `hf-vicreg finetune detection` makes it, got "
            f"{model_name!r} of type {config.model_type!r}: {reason}"
        ) from error
    if info["missing_keys"]:
        raise InputError(
            f"`MODEL`: expected weights for the whole detector in {model_name}, found none for "
            f"{sorted(info['missing_keys'])[0]}."
        )
    processor = load_processor(model_name, detector.config)
    of_encoder = isinstance(processor, ChannelPixelsMixin) and not processor.do_pad  # type: ignore[attr-defined]
    if of_encoder or not hasattr(processor, "post_process_object_detection"):
        raise InputError(
            f"`MODEL`: expected a detector's image processor in {model_name}, found {type(processor).__name__}; save "
            "it beside the weights."
        )
    files = ImageSource("images", len(images), lambda index: Path(images[index]).read_bytes(), "", paths=images)
    source = source_for(processor, files)
    for index, path in enumerate(images):
        refusal = source.refusal(index)
        if refusal is not None:
            raise InputError(f"`IMAGE`: expected image files, cannot read {path}: {refusal}.")
    detector.to("cuda" if torch.cuda.is_available() else "cpu")
    folder = None if output is None else Path(output)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    for index, path in enumerate(images):
        image = source.read(index)
        assert image is not None
        (found,) = find_boxes(detector, processor, [image], threshold=threshold)
        print(f"{one_line(path)}: {len(found['boxes'])} objects")
        for score, label, box in zip(*(found[key].tolist() for key in ("scores", "labels", "boxes")), strict=True):
            left, top, right, bottom = box
            print(
                f"  {one_line(detector.config.id2label[label])} {score:.2f} at {left:.0f}, {top:.0f}, size "
                f"{right - left:.0f}x{bottom - top:.0f}"
            )
        if folder is not None:
            picture = as_picture(image, *ranges_of(processor))
            draw_found(picture, found, detector.config.id2label).save(folder / f"{Path(path).stem}.png")
    if folder is not None:
        print(f"written to {folder}")
