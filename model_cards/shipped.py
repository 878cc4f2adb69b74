"""Where the encoders lie that come with the package."""

import difflib
import functools
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).resolve().parent
WEIGHTS = "model.safetensors"


def names() -> list[str]:
    """Return what the encoders that come with the package are called."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{WEIGHTS}"))


def located(name: str) -> str:
    """Return the folder of an encoder that comes with the package, by its name; any other name as it is.

    A folder of the user's that is called the same comes first; the log says so.
    """
    if name not in names():
        return name
    if os.path.exists(name):
        _say_taken(name, os.path.abspath(name))
        return name
    return str(FOLDER / name)


@functools.cache  # configuration, weights and processor are looked for one by one
def _say_taken(name: str, _place: str) -> None:
    logger.info(
        "%s: taken from the folder of this name here, not from the package; for the package's, call it from another "
        "folder or rename this one",
        name,
    )


def misnamed(name: str) -> str | None:
    """Say which encoder that comes with the package has nearly this name; None where it may mean another model.

    Names of a folder, and of a Hub's owner and model with a slash between, are others.
    """
    near = difflib.get_close_matches(name, names(), 1, cutoff=0.8)
    if not near or name in names() or "/" in name or os.path.exists(name):
        return None
    return f", which is none; did you mean {near[0]!r}, which comes with the package?"
