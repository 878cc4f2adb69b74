"""Where the encoders lie that come with the package."""

import os
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
WEIGHTS = "model.safetensors"


def names() -> list[str]:
    """Return what the encoders that come with the package are called."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{WEIGHTS}"))


def located(name: str) -> str:
    """Return the folder of an encoder that comes with the package, by its name; any other name as it is.

    A folder of the user's that is called the same comes first.
    """
    return str(FOLDER / name) if name in names() and not os.path.exists(name) else name
