"""The encoders that a plan chooses from, from the smallest to ViT-Base."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Size:
    """An encoder of the ladder, with the batch it is trained on and how many images it wants to see.

    Attributes:
        name: For people.
        model: Its fields.
        cells: The image is cut into so many strides a side; overlapping patches of two strides make one row fewer.
        batch: Images of a step.
        images_seen: Images to see in all, below which a smaller encoder is the better one. From runs on CIFAR-10
            (the first rung) and the schedules people publish for the others; an order of magnitude.
    """

    name: str
    model: dict[str, Any]
    cells: int
    batch: int
    images_seen: int

    def fields_at(self, width: int | None) -> dict[str, Any]:
        """Return the encoder's fields, for a width that was given: heads and MLP are as wide in proportion.

        A head keeps its width where that divides the encoder's, else it has the nearest one that does.
        """
        own = self.model["hidden_size"]
        if width is None or width == own or width < 1:
            return self.model
        head = own // self.model["num_attention_heads"]
        divisors = [one for one in range(8, width + 1, 4) if width % one == 0] or [width]  # of 4, for rotary positions
        head = min(divisors, key=lambda one: (abs(one - head), one))
        mlp = width * self.model["intermediate_size"] // own
        return self.model | {"num_attention_heads": width // head, "intermediate_size": mlp}


def _fields(width: int, layers: int, heads: int, mlp: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
    }


LADDER = (
    Size("smallest", _fields(128, 3, 4, 384) | {"initializer_range": 0.06}, 8, 256, 0),
    Size("small", _fields(192, 6, 3, 768), 8, 256, 1_500_000),
    Size("ViT-Tiny", _fields(192, 12, 3, 768), 16, 512, 5_000_000),
    Size("ViT-Small", _fields(384, 12, 6, 1536), 16, 1024, 20_000_000),
    Size("ViT-Base", _fields(768, 12, 12, 3072), 16, 2048, 150_000_000),
)


def training_flops(size: Size) -> float:
    """Return the FLOPs of one image's two views, forward and backward: matrices of the layers and the expander."""
    model, width = size.model, 8 * size.batch
    tokens = (size.cells - 1) ** 2 + 1
    layer = 4 * model["hidden_size"] ** 2 + 2 * model["hidden_size"] * model["intermediate_size"]
    expander = model["hidden_size"] * width + 2 * width**2
    return 3 * 2 * 2 * (tokens * model["num_hidden_layers"] * layer + expander)


def used_side(side: int, crop: float, stride: int | list[int] | tuple[int, int]) -> int:
    """Return the side of the images that an encoder is best used with, in pixels, not below that of the views.

    A crop has on average `sqrt((1 + crop) / 2)` of the image's side: what it shows looks larger by as much.

    Args:
        side: Of the views that it is trained on.
        crop: The smallest share of an image's area that a view shows; the largest is all of it.
        stride: Of the patches.
    """
    step = stride if isinstance(stride, int) else math.lcm(*stride)
    return max(side, round(side / math.sqrt((1 + crop) / 2) / step) * step)
