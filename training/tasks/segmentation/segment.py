"""`hf-vicreg segment`: the masks that a segmenter finds on images of any size, as files."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, BaseImageProcessor, PreTrainedModel

from hf_vicreg.model_cards.escaping import one_line
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import load_config, load_processor, load_weights, source_for
from hf_vicreg.training.images.channels.raster import as_picture
from hf_vicreg.training.images.sources import ImageSource
from hf_vicreg.training.run.places import IMAGE_SUFFIXES, SCIENCE_SUFFIXES, files_below
from hf_vicreg.training.tasks.backbone import ranges_of
from hf_vicreg.training.tasks.segmentation.mask_drawing import draw_mask, draw_objects
from hf_vicreg.training.tasks.segmentation.masks import INSTANCE_CLASSES, MAX_CLASSES, check_extra, objects_of
from hf_vicreg.training.tasks.segmentation.model import find_classes

MAX_OBJECTS = 65535  # of a 16-bit PNG


def segment(model_name: str, images: Sequence[str], output: str) -> None:
    """Write for each image `NAME_mask.png`, a class index a pixel, and `NAME_overlay.png`.

    A model of interior and border also writes `NAME_objects.png`, which numbers objects from 1 on, 16 bits a pixel.

    Args:
        model_name: Folder or Hub id of a segmenter.
        images: Image files, and folders of them; files of science for a model of such channels.
        output: Folder of what is written.

    Raises:
        InputError: No segmenter, no images, or two whose masks would have one name; nothing is written.
    """
    paths = [path for given in images for path in _files_of(given)]
    missing = next((path for path in paths if not os.path.exists(path)), None)
    if missing is not None:
        raise InputError(f"`IMAGE`: expected image files, cannot read {missing}: there is none.")
    segmenter, processor = load_segmenter(model_name)
    if ranges_of(processor)[0] is None:  # of RGB: what else lies in a folder is not meant
        paths = [path for path in paths if path in images or _is_picture(path)]
        if not paths:
            raise InputError("`IMAGE`: expected image files of 8-bit RGB, which this segmenter takes, found none.")
    names = [Path(path).stem for path in paths]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"`IMAGE`: expected names that differ, found several of {twice!r}; write them one at a time.")
    files = ImageSource("images", len(paths), lambda index: Path(paths[index]).read_bytes(), "", paths=paths)
    source = source_for(processor, files)
    for index, path in enumerate(paths):
        reason = source.refusal(index)
        if reason is not None:
            raise InputError(f"`IMAGE`: expected image files, cannot read {path}: {reason}.")
    class_names = list(segmenter.config.id2label.values())
    instances = class_names == INSTANCE_CLASSES
    if instances:
        check_extra()
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    for index, (path, name) in enumerate(zip(paths, names, strict=True)):
        image = source.read(index)
        assert image is not None
        picture = as_picture(image, *ranges_of(processor))
        mask = find_classes(segmenter, processor, image).numpy()
        Image.fromarray(mask.astype(np.uint8)).save(folder / f"{name}_mask.png")
        shares = np.bincount(mask.ravel(), minlength=len(class_names)) / mask.size
        said = ", ".join(
            f"{one_line(class_name)} {share:.1%}" for class_name, share in zip(class_names, shares, strict=True)
        )
        if instances:
            objects = objects_of(mask)
            if objects.max() > MAX_OBJECTS:
                raise InputError(f"`IMAGE`: expected at most {MAX_OBJECTS} objects, found {objects.max()} on {path}.")
            Image.fromarray(objects.astype(np.uint16)).save(folder / f"{name}_objects.png")
            draw_objects(picture, objects).save(folder / f"{name}_overlay.png")
            said = f"{objects.max()} objects; {said}"
        else:
            draw_mask(picture, mask).save(folder / f"{name}_overlay.png")
        print(f"{one_line(path)}: {said}")
    print(f"written to {folder}")


def load_segmenter(name: str) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Return a segmenter on the best device, and its image processor.

    Raises:
        InputError: No segmenter there, weights missing, or a processor without window, mean or deviation.
    """
    config = load_config(name)
    try:
        segmenter, info = load_weights(AutoModelForSemanticSegmentation, name)
    except (OSError, ValueError, ImportError, StrictDataclassError) as error:  # ImportError: a backbone of timm's
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"`MODEL`: expected the folder or Hub id of a segmenter, as `finetune segmentation` makes it, got "
            f"{name!r} of type {config.model_type!r}: {reason}"
        ) from error
    if info["missing_keys"]:
        raise InputError(
            f"`MODEL`: expected weights for the whole segmenter in {name}, found none for "
            f"{sorted(info['missing_keys'])[0]}."
        )
    if segmenter.config.num_labels > MAX_CLASSES:
        raise InputError(f"`MODEL`: expected at most {MAX_CLASSES} classes, {name} has {segmenter.config.num_labels}.")
    processor = load_processor(name, segmenter.config)
    size = getattr(processor, "size", None)
    if not size or "height" not in size or "width" not in size or not processor.image_mean:
        raise InputError(
            f"`MODEL`: expected an image processor with height, width, mean and deviation in {name}, found "
            f"{type(processor).__name__} with {size}."
        )
    segmenter.to("cuda" if torch.cuda.is_available() else "cpu")
    return segmenter, processor


def _files_of(given: str) -> list[str]:
    """Return an image file, or those below a folder; an OME-Zarr is a folder and an image."""
    if not Path(given).is_dir() or Path(given).suffix.lower() == ".zarr":
        return [given]
    found = sorted(
        path
        for path in files_below(given, zarr=True)
        if _is_picture(path) or Path(path).suffix.lower() in SCIENCE_SUFFIXES
    )
    if not found:
        raise InputError(f"`IMAGE`: expected image files below {given}, found none.")
    return found


def _is_picture(path: str) -> bool:
    return Path(path).suffix.lower() in IMAGE_SUFFIXES
