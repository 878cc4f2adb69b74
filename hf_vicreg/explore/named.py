"""What a call of `hf-vicreg explore` names, checked before anything heavy is imported."""

import os

from hf_vicreg.model_cards.shipped import misnamed
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.run.places import IMAGE_SUFFIXES, absence, data_setting, refuse_empty


def check_images(images: str, model: str | None, data: str | None) -> None:
    """Refuse images that cannot be embedded: what is named is no folder of `hf-vicreg embed`.

    Args:
        images: Images as of `hf-vicreg embed`.
        model: Folder or Hub id of the encoder.
        data: Images beside a folder of embeddings.

    Raises:
        InputError: No images there, no model, or `data` beside images.
    """
    missing = absence(images)
    if missing:
        raise InputError(f"`IMAGES`: expected a folder of images or a Hub id, got {images!r}{missing}")
    if os.path.isfile(images) and os.path.splitext(images)[1].lower() in IMAGE_SUFFIXES:
        raise InputError(f"`IMAGES`: expected a folder of images, got {images!r}, which is a file; name its folder.")
    if os.path.isdir(images):
        refuse_empty(images, "IMAGES")
    elif not os.path.isfile(images):
        data_setting(images, {}, "IMAGES")
    if data is not None:
        raise InputError(f"`data`: expected it beside a folder of `hf-vicreg embed` alone, {images} is none.")
    if model is None:
        raise InputError(
            f"`MODEL`: expected a model to embed {images} with, got none; name one behind it, or name a folder that "
            "`hf-vicreg embed` made."
        )
    missing = absence(model) or misnamed(model)
    if missing:
        raise InputError(f"`MODEL`: expected the folder or Hub id of a vision model, got {model!r}{missing}")
