"""What the page of an explorer asks for: images alike, by an image or by words; copies, outliers, clusters, labels."""

import csv
import io
import json
import threading
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from hf_vicreg.explore.analysis import Analysis, analyse
from hf_vicreg.explore.finds import Copies, find_copies, find_outliers, set_apart, spread_labels
from hf_vicreg.explore.image_set import ImageSet, open_set
from hf_vicreg.hub_space.pictures import fitted
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import DualImages
from hf_vicreg.training.evaluation.features import pixels_of
from hf_vicreg.training.images.decoding import UnusableImage, decode
from hf_vicreg.training.prepare.arguments import embed_arguments

if TYPE_CHECKING:
    from hf_vicreg.training.image_text.dual import Dual

NEEDED = {
    "faiss": "faiss-cpu",
    "starlette": "starlette",
    "uvicorn": "uvicorn",
    "sklearn": "scikit-learn",
}
AT_ONCE = 2  # images decoded at the same time: one of the largest that are taken needs 400 MB
LABEL_COLUMNS = ("file_name", "label", "split", "source", "confidence", "digest")
KEPT_THUMBNAILS = 4000


@dataclass(frozen=True)
class Labels:
    """Labels that have spread over a set.

    Attributes:
        names: Of the classes, in the order in which they were first given.
        classes: `(images,)` int64 into them, -1 for none.
        confidences: `(images,)` float32; 1 for those given.
        given: Class of each row that was labelled by hand.
    """

    names: list[str]
    classes: np.ndarray
    confidences: np.ndarray
    given: dict[int, int]


class Explorer:
    """A set of images with all that is told of it. Rows are numbered from 0 on; safe to use from several threads."""

    def __init__(self, images: ImageSet, analysis: Analysis):
        self.images, self.analysis = images, analysis
        self._lock = threading.Lock()  # of the model
        self._decoders = threading.Semaphore(AT_ONCE)
        self._thumbnail = lru_cache(KEPT_THUMBNAILS)(self._encoded)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def takes_words(self) -> bool:
        """Whether images can be searched for by words."""
        return isinstance(self.images.encoder, DualImages)

    def near_row(self, row: int, count: int) -> list[tuple[int, float]]:
        """Return the rows nearest to one of the images with their cosines, itself left out, nearest first."""
        found = self._nearest(self.analysis.index.vector(row), count + 1)
        return [pair for pair in found if pair[0] != row][:count]

    def near_image(self, encoded: bytes, count: int) -> list[tuple[int, float]]:
        """Return the rows nearest to an image file's content, with their cosines.

        Raises:
            InputError: It cannot be decoded, or there is no model to embed it with.
        """
        encoder = self.images.encoder
        if encoder is None:
            raise InputError(
                "`MODEL`: expected the model of these embeddings to look for an image, got none; name it."
            )
        if getattr(encoder.processor, "channel_low", None) is not None:
            raise InputError("`image`: expected images of 3 channels to look for one; click one of the set instead.")
        with self._decoders:
            try:
                image = decode(encoded, (1, 1), None)
            except UnusableImage as error:
                raise InputError(f"`image`: expected an image file, this one is of no use: {error}.") from error
        with self._lock:
            feature = encoder(pixels_of([image], encoder.processor, 1)).float().cpu().numpy()
        return self._nearest(feature[0], count)

    def near_words(self, words: str, count: int) -> list[tuple[int, float]]:
        """Return the rows nearest to some words, with their cosines.

        Raises:
            InputError: No words, or a model of images alone.
        """
        if not self.takes_words:
            raise InputError("`words`: expected a model of images and texts, of a run with --caption_column.")
        if not words.strip():
            raise InputError("`words`: expected some words, got none.")
        with self._lock:
            feature = self._dual.texts([words]).numpy()
        return self._nearest(feature[0], count)

    def copies(self, share: float = 0.5) -> Copies:
        """Return groups of near-duplicates; `share` as of `find_copies`."""
        table = self.analysis
        return find_copies(table.neighbours, table.cosines, self.images.digests, share)

    def outliers(self, count: int = 60) -> list[tuple[int, float]]:
        """Return the rows of outliers and how strange they are, as of `strangeness`, strangest first."""
        return find_outliers(self.analysis.strange, count)

    def clusters(self) -> list[tuple[int, list[int]]]:
        """Return of each cluster how many images it has, and those nearest to its centre; the largest first."""
        sizes = np.bincount(self.analysis.clusters, minlength=len(self.analysis.central))
        return list(zip(sizes.tolist(), self.analysis.central, strict=True))

    def spread(self, given: dict[int, str]) -> Labels:
        """Return labels for all images from those given to some rows."""
        names = list(dict.fromkeys(given.values()))
        rows = {row: names.index(name) for row, name in given.items()}
        if not rows:
            return Labels([], np.full(len(self), -1), np.zeros(len(self), np.float32), {})
        classes, sure = spread_labels(self.analysis.neighbours, self.analysis.cosines, rows, len(names))
        return Labels(names, classes, sure, rows)

    def labels_csv(self, given: dict[int, str], least: float) -> bytes:
        """Return `labels.csv`: the labels given and those that spread with a confidence of at least `least`.

        `hf-vicreg finetune classification --labels_file` reads it. A fifth of each class has the split `test`. The
        digest of an image's bytes says which image is meant: `row 5` is another one in another split.
        """
        found = self.spread(given)
        rows = [
            row
            for row in range(len(self))
            if row in found.given or (found.classes[row] >= 0 and found.confidences[row] >= least)
        ]
        names = [self.images.file_name(row) for row in rows]
        labels = [found.names[found.classes[row]] for row in rows]
        text = io.StringIO(newline="")
        # all quoted: before Python 3.13 a name with a carriage return would not be
        writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerow(LABEL_COLUMNS)
        for row, name, label, apart in zip(rows, names, labels, set_apart(names, labels), strict=True):
            how = "given" if row in found.given else "spread"
            sure = f"{found.confidences[row]:.4f}"
            digest = self.images.digests[row].hex()
            writer.writerow([name, label, "test" if apart else "train", how, sure, digest])
        return text.getvalue().encode(errors="surrogateescape")

    def files_text(self, rows: list[int]) -> bytes:
        """Return the names of some images, one a line; a name that breaks lines is written as a string of JSON."""
        names = [self.images.file_name(row) for row in rows]
        lines = [json.dumps(name) if len(name.splitlines()) != 1 else name for name in names]
        return "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")

    def picture(self, row: int, side: int) -> bytes | None:
        """Return an image as JPEG, its longer side at most `side` pixels; None if it is not at hand."""
        try:
            return self._thumbnail(row, side)
        except UnusableImage:  # and it may be at hand the next time
            return None

    def _encoded(self, row: int, side: int) -> bytes:
        source = self.images.source
        if source is None:
            raise UnusableImage("missing")
        with self._decoders:
            read: Any = source.read(
                int(self.images.ids[row]), lambda width, height: max(1, min(width, height) // side)
            )
        if read is None:
            raise UnusableImage("unreadable")
        image = read if isinstance(read, Image.Image) else _as_picture(np.asarray(read))
        with io.BytesIO() as file:
            fitted(image, side).save(file, "JPEG", quality=88)
            return file.getvalue()

    def _nearest(self, vector: np.ndarray, count: int) -> list[tuple[int, float]]:
        length = float(np.linalg.norm(vector))
        if not np.isfinite(length) or not length:
            raise InputError("`image`: expected an embedding with a direction, the model gives 0 or NaN.")
        rows, cosines = self.analysis.index.nearest(vector / length, count)
        return [pair for pair in zip(rows[0].tolist(), cosines[0].tolist(), strict=True) if pair[0] >= 0]

    @cached_property
    def _dual(self) -> "Dual":
        from hf_vicreg.training.image_text.dual import Dual
        from hf_vicreg.training.texts.tokenizer import load_tokenizer

        encoder: Any = self.images.encoder
        return Dual(encoder.model, encoder.processor, load_tokenizer(encoder.model.config._name_or_path, "MODEL"))


def open_explorer(images: str, model: str | None = None, *, data: str | None = None, **flags: Any) -> Explorer:
    """Return an explorer of images, embedded and analysed now, with progress, or in an earlier call.

    Args:
        images: A folder of images, a data set, or a folder that `hf-vicreg embed` made.
        model: Folder or Hub id of the encoder. Not needed for a folder of embeddings; then no image can be dropped in.
        data: The images of a folder of embeddings, to be shown.
        flags: As of `hf-vicreg embed`: `split`, `batch_size`, `num_workers`, `device`, ...

    Raises:
        InputError: Bad input, or a library is not installed.
    """
    check_installed()
    found = open_set(str(images), None if model is None else str(model), data, embed_arguments(flags))
    return Explorer(found, analyse(found))


def check_installed() -> None:
    """Raise an InputError that names the libraries that are not installed, and the command that installs them."""
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise InputError(f"`explore`: expected {', '.join(missing)}; pip install 'hf-vicreg[explore]'.")


def _as_picture(pixels: np.ndarray) -> Image.Image:
    """Return `(height, width, channels)` of any type as a picture: its first one or three channels, least to most."""
    shown = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., :1].repeat(3, -1)
    shown = np.nan_to_num(shown.astype(np.float32))
    low, high = shown.min((0, 1)), shown.max((0, 1))
    return Image.fromarray(((shown - low) / np.maximum(high - low, 1e-12) * 255).astype(np.uint8))
