"""Pretrained encoders that come with the package, each with its card and the evidence behind it."""

import difflib
from typing import TYPE_CHECKING

from hf_vicreg.model_cards.shipped import FOLDER, names

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(name: str) -> "PreTrainedModel":
    """Return a pretrained encoder that comes with the package, in evaluation mode.

    `AutoImageProcessor.from_pretrained(model.name_or_path)` is its image processor, and the folder of that name holds
    its card.

    Args:
        name: `digits`, `cifar10_cpu`, `cifar10_cpu_long` or `nuclei`; what is on the Hub or in a folder of yours,
            `AutoModel.from_pretrained` loads.

    Raises:
        ValueError: There is no such encoder.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else "; for a folder or the Hub use AutoModel.from_pretrained."
        raise ValueError(f"`name`: expected one of {', '.join(names())}, got {name!r}{hint}")
    from transformers import AutoModel

    return AutoModel.from_pretrained(FOLDER / name, use_safetensors=True).eval()
