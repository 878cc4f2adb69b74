"""From the bytes of an image file to upright RGB pixels, whatever people have in their folders.

What is dealt with: turned photographs (EXIF), grey, palette, CMYK and 16-bit pixels, animations (their first frame),
doubtful metadata (ignored), images too large for memory (refused before they are decoded), and JPEGs far larger than
what is wanted of them, which are decoded at a half, a quarter or an eighth of their size. What cannot be used is
refused with a reason in words.
"""

import errno
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

from PIL import Image, TiffImagePlugin, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from hf_vicreg.modeling.rgb_image import orientation_of, upright_rgb

MAX_PIXELS = 2**27  # decoded, half a gigabyte; a JPEG may have 64 times as many
JPEG_START = b"\xff\xd8\xff"
EARLY_EXIF = {"JPEG", "MPO", "TIFF"}  # formats whose metadata lie before the pixels, or can be found without them

# Why an image cannot be used, each kind in words. A stream stores a kind by its place: add new ones at the end.
KINDS = {
    "missing": "missing file",
    "unreadable": "cannot be read",
    "empty": "empty file",
    "not an image": "not an image",
    "truncated": "truncated",
    "damaged": "damaged",
    "too large": "too many pixels",
    "too small": "smaller than a patch",
    "float": "float image: what its values mean is not known",
    "memory": "not enough memory to decode it",
    "channels": "other channels than wanted",
    "axes": "order of axes not known",
    "depth": "values of another kind",
    "library": "a library is not installed",
    "no pixels": "no pixels in it",
    "no multiscales": "a Zarr that is no OME-Zarr",
}
# How files of known formats begin, and what people take for images by mistake.
BEGINNINGS = {
    JPEG_START: "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"RIFF": "WebP",
    b"BM": "BMP",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
}


class UnusableImage(ValueError):  # noqa: N818 - not always an error: a small image is fine elsewhere
    """An image that cannot be used; its text is the reason in plain words.

    Attributes:
        kind: A key of `KINDS`, for counting.
    """

    def __init__(self, kind: str, reason: str | None = None):
        super().__init__(reason or KINDS[kind])
        self.kind = kind

    def __reduce__(self) -> tuple:
        """Travel between processes with both parts."""
        return type(self), (self.kind, str(self))


@dataclass(frozen=True)
class Header:
    """What a file says of its image before it is decoded.

    Attributes:
        width: In pixels, as the image is shown.
        height: In pixels, as the image is shown.
        mode: Pillow's name for its channels and their depth.
        format: Pillow's name for the kind of file.
    """

    width: int
    height: int
    mode: str
    format: str


def decode(
    encoded: bytes, min_size: tuple[int, int] = (1, 1), reduction: Callable[[int, int], int] | None = None
) -> Image.Image:
    """Return the image in RGB, upright.

    Args:
        encoded: An image file's contents.
        min_size: Smallest image to accept, (height, width) in pixels.
        reduction: Called with the upright (width, height); returns how many times smaller each side may be decoded.
            Followed by JPEGs alone, up to 8 and never beyond what it says.

    Raises:
        UnusableImage: A broken file, or an image that is too small, too large, or of floats without a known range.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken metadata, sizes that are checked below
            return _decode(encoded, min_size, reduction)
    except Exception as error:  # on broken files Pillow raises nearly anything
        raise unusable(error, encoded) from error


def _decode(encoded: bytes, min_size: tuple[int, int], reduction: Callable[[int, int], int] | None) -> Image.Image:
    image = _open(BytesIO(encoded))
    _refuse_channels(image)
    original = image.size
    if isinstance(image, JpegImageFile):
        wanted = reduction(*_upright(original, image)) if reduction is not None else 1
        needed = max(1.0, (image.width * image.height / MAX_PIXELS) ** 0.5)
        factor = next((one for one in (8, 4, 2) if one <= wanted or one / 2 < needed <= one), 1)
        if factor > 1:
            image.draft(None, (max(1, image.width // factor), max(1, image.height // factor)))
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(*original)
    image.load()  # before the metadata of other formats: these may lie behind the pixels, and reading them decodes
    width, height = _upright(original, image)
    if height < min_size[0] or width < min_size[1]:
        raise _too_small(width, height, min_size)
    return upright_rgb(image)


def read_header(file: BinaryIO, min_size: tuple[int, int] = (1, 1)) -> Header:
    """Return what an image file says of itself, without decoding it.

    Args:
        file: Open at its start; only its beginning is read where the format allows it.
        min_size: Smallest image to accept, (height, width) in pixels.

    Raises:
        UnusableImage: No image, or one that is too small, too large, or of floats.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = _open(file)
            width, height = _upright(image.size, image) if image.format in EARLY_EXIF else image.size
    except Exception as error:  # on broken files Pillow raises nearly anything
        file.seek(0)
        raise unusable(error, file.read()) from error
    if width * height > MAX_PIXELS * (64 if isinstance(image, JpegImageFile) else 1):
        raise _too_large(width, height)
    if height < min_size[0] or width < min_size[1]:
        raise _too_small(width, height, min_size)
    _refuse_channels(image)
    return Header(width, height, image.mode, image.format or "")


def unusable(error: Exception, encoded: bytes | None = None) -> UnusableImage:
    """Return in words why an image cannot be used.

    Args:
        error: What reading or decoding it raised.
        encoded: The file's contents; None if they could not be read.
    """
    if isinstance(error, UnusableImage):
        return error
    if isinstance(error, MemoryError):
        return UnusableImage("memory")
    if encoded is None:
        return _unread(error)
    if not encoded:
        return UnusableImage("empty")
    if isinstance(error, Image.DecompressionBombError):
        return _too_large(*_claimed_size(encoded))
    form = next((form for start, form in BEGINNINGS.items() if encoded.startswith(start)), None)
    if isinstance(error, UnidentifiedImageError) and form is None:
        text = encoded[:64].lstrip().lower()
        what = " (a web page)" if text.startswith((b"<!doctype", b"<html")) else ""
        return UnusableImage("not an image", KINDS["not an image"] + what)
    samples = _samples(encoded) if form == "TIFF" else 0
    if isinstance(error, UnidentifiedImageError) and samples not in (0, 1, 3, 4):
        remedy = f"--model.num_channels {samples} takes them all"
        return UnusableImage("channels", f"{samples} channels where 3 are wanted; {remedy}")
    what = form or "image"
    message = _words(error)
    if "truncated" in message.lower() or (form is not None and len(encoded) < 64):
        return UnusableImage("truncated", f"truncated {what}")
    return UnusableImage("damaged", f"damaged {what}" + (f" ({message})" if message else ""))


def _samples(encoded: bytes) -> int:
    """Return how many channels a TIFF says its pixels have, 0 if it cannot be told."""
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(encoded[:8])
        file = BytesIO(encoded)
        file.seek(tags.next)
        tags.load(file)
        return int(tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 0))
    except Exception:  # a broken one
        return 0


def _refuse_channels(image: Image.Image) -> None:
    """Raise UnusableImage for what would lose channels or depth as RGB: floats, and stacks of grey pages."""
    if image.mode == "F":
        raise UnusableImage("float")
    if image.format == "TIFF" and image.mode[0] in "LI" and getattr(image, "n_frames", 1) > 1:
        pages = image.n_frames  # type: ignore[attr-defined]
        raise UnusableImage(
            "channels", f"{pages} grey pages, not RGB: --model.num_channels {pages} takes them as channels"
        )


def _unread(error: Exception) -> UnusableImage:
    """Return why a file's bytes could not be had."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        return UnusableImage("missing")
    if number == errno.EACCES:
        return UnusableImage("unreadable", "cannot be read: no permission")
    # an errno's text is short; other errors say it themselves
    message = error.strerror if isinstance(error, OSError) and error.strerror else _words(error)
    return UnusableImage("unreadable", f"{KINDS['unreadable']}: {message}")


def _words(error: Exception) -> str:
    """Return an error's message as one short printable line, without the object that Pillow may name in it."""
    if isinstance(error, UnidentifiedImageError):
        return "its beginning is"
    text = "".join(one if one.isprintable() else " " for one in str(error))
    return " ".join(text.split())[:100]


def _too_large(width: int, height: int) -> UnusableImage:
    size = f"{width}x{height} pixels" if width else KINDS["too large"]
    return UnusableImage("too large", f"{size} refused, at most {MAX_PIXELS:,} are decoded")


def _too_small(width: int, height: int, min_size: tuple[int, int]) -> UnusableImage:
    wanted = f"{min_size[1]}x{min_size[0]}"
    return UnusableImage("too small", f"{width}x{height} pixels, smaller than a patch of {wanted} (width x height)")


def _claimed_size(encoded: bytes) -> tuple[int, int]:
    """Return (width, height) of an image that `Image.open` refuses for its size; zeros if it cannot be told."""
    for factory, accept in Image.OPEN.values():
        try:
            if accept is None or accept(encoded[:16]) is True:
                return factory(BytesIO(encoded), "").size
        except Exception:  # not of this format
            continue
    return 0, 0


def _open(file: BinaryIO) -> Image.Image:
    start = file.read(len(JPEG_START))
    file.seek(0)
    # `Image.open` would refuse by size what can be decoded at an eighth of it
    return JpegImageFile(file) if start == JPEG_START else Image.open(file)


def _upright(size: tuple[int, int], image: Image.Image) -> tuple[int, int]:
    return size[::-1] if orientation_of(image) >= 5 else size  # 5 to 8 are quarter turns
