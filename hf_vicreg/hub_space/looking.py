"""What the page shows of a picture: the colours of its patches, its features, and where every head looks."""

import base64
import io
import threading
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModel

from .attention import attention_maps, grid_of, lattice
from .colours import PatchColours, colour_images
from .pictures import data_uri, image_of

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")  # of a visitor's picture: others have readers that start programs
MAX_PIXELS = 40_000_000  # of a picture, before it is decoded
MAX_PATCHES = 1600  # of an image whose attention is computed: it is as many times as many numbers, for every head
AT_ONCE = 2  # visitors' pictures decoded at the same time: the largest need 250 MB
ATTENTION_BYTES = 3_000_000  # sent of it, before they become text; patches that look are thinned out to stay below


@dataclass(frozen=True)
class Seen:
    """What an encoder makes of a picture.

    Attributes:
        pixels: `(1, 3, height, width)`, as the encoder is given them.
        tokens: `(rows, columns, hidden_size)` float32 of the patches.
        feature: `(features,)` float32, of length 1.
    """

    pixels: torch.Tensor
    tokens: torch.Tensor
    feature: torch.Tensor


class Looking:
    """An encoder and the pictures beside it. One thread at a time: attention is read in another form than features."""

    def __init__(self, name: str, revision: str | None, pictures: list[Image.Image]):
        """Load an encoder and look at the pictures.

        Args:
            name: Of a repository whose code may be run, or a folder.
            revision: A commit of the repository.
            pictures: To look for neighbours among.

        Raises:
            ValueError: A model without a token for each patch, or with features that are not finite.
        """
        pinned: dict[str, Any] = {"trust_remote_code": True} | ({"revision": revision} if revision else {})
        self.processor = AutoImageProcessor.from_pretrained(name, backend="pil", **pinned)
        self.model = AutoModel.from_pretrained(name, **pinned).eval()
        self.turn, self.decoders = threading.Lock(), threading.BoundedSemaphore(AT_ONCE)
        seen = [self._see(picture) for picture in pictures]
        self.features = torch.stack([one.feature for one in seen])
        self.colours = PatchColours(torch.cat([one.tokens.flatten(0, 1) for one in seen]))

    def look(self, picture: Image.Image, name: str) -> dict[str, Any]:
        """Return what the page shows of a picture.

        Args:
            picture: Any kind of PIL image.
            name: What the page calls it.
        """
        with self.turn:
            seen = self._see(picture)
            own = PatchColours(seen.tokens)
            shown = image_of(seen.pixels[0], *self._normalisation())
            return {
                "image": data_uri(shown),
                "size": f"{shown.height}x{shown.width} pixels",
                "grid": list(seen.tokens.shape[:2]),
                "colours": {
                    kind: data_uri(colour_images(colours(seen.tokens)[None])[0])
                    for kind, colours in (("own", own), ("all", self.colours))
                },
                "feature": packed(seen.feature),
                "attention": self._attention(seen, shown, name),
            }

    def look_at_sent(self, encoded: bytes) -> dict[str, Any]:
        """Return the same of a visitor's picture.

        Raises:
            ValueError: As `opened` does.
        """
        with self.decoders:  # to the end: pictures that wait for their turn take memory
            return self.look(opened(encoded), "your picture")

    def _see(self, picture: Image.Image) -> Seen:
        pixels = self.processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
        rows, columns = grid_of(self.model, *pixels.shape[-2:])
        with torch.no_grad():
            outputs = self.model(pixel_values=pixels)
        states = outputs.last_hidden_state
        if states.ndim != 3 or states.shape[1] < rows * columns:
            raise ValueError("`MODEL`: expected one with a token for each patch, got another.")
        pooled = getattr(outputs, "pooler_output", None)
        feature = (states.mean(1) if pooled is None else pooled)[0].float()
        if not feature.isfinite().all():
            raise ValueError("`MODEL`: expected finite features, got NaN or infinity.")
        tokens = states[0, -rows * columns :].float().unflatten(0, (rows, columns))
        return Seen(pixels, tokens, torch.nn.functional.normalize(feature, dim=0))

    def _attention(self, seen: Seen, shown: Image.Image, name: str) -> dict[str, Any]:
        rows, columns = seen.tokens.shape[:2]
        if rows * columns > MAX_PATCHES:
            return {"none": f"Not computed: {rows}x{columns} patches are more than {MAX_PATCHES:,}."}
        config: Any = self.model.config
        a_query = 4 * config.num_hidden_layers * config.num_attention_heads * (rows * columns + 1)
        queries = lattice(rows, columns, max(1, ATTENTION_BYTES // a_query - 1))
        maps = attention_maps(self.model, seen.pixels, [-1, *queries])
        item = {
            "name": name,
            "size": f"{shown.height}x{shown.width} pixels",
            "image": data_uri(shown),
            "grid": [rows, columns],
            "leading": maps.leading,
            "queries": maps.queries,
            "shape": list(maps.weights.shape),
            "weights": packed(maps.weights),
            "tiles": maps.tile_of_patch,
            "levels": maps.levels,
        }
        return {"items": [item]}

    def _normalisation(self) -> tuple[list[float], list[float]]:
        mean, std = (getattr(self.processor, name, None) for name in ("image_mean", "image_std"))
        return list(mean or [0.0] * 3), list(std or [1.0] * 3)


def packed(numbers: torch.Tensor) -> str:
    """Return numbers as text: float32 of any shape, little-endian, in base 64."""
    return base64.b64encode(numbers.contiguous().numpy().astype("<f4").tobytes()).decode()


def opened(encoded: bytes) -> Image.Image:
    """Return a visitor's picture, upright.

    Raises:
        ValueError: Not a picture, of another format, or too large.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as picture:
            if picture.width * picture.height <= MAX_PIXELS:
                upright = ImageOps.exif_transpose(picture)
                if upright.mode.startswith("I"):
                    # 16 bits keep their upper 8, as in training: Pillow clips them at 255
                    numbers = torch.frombuffer(bytearray(upright.convert("I").tobytes()), dtype=torch.int32)
                    upper = (numbers >> 8).clamp(0, 255).to(torch.uint8)
                    upright = Image.frombytes("L", upright.size, upper.numpy().tobytes())
                return upright.convert("RGB")
    except Exception as error:  # whatever a damaged file brings a decoder to
        raise ValueError(f"no picture that can be read: {', '.join(FORMATS)} are needed") from error
    raise ValueError(f"a picture of at most {MAX_PIXELS:,} pixels is needed")
