"""The images a report is made with: those named to it, or the built-in ones; a recipe's paths are never followed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from hf_vicreg.model_cards.escaping import one_line
from hf_vicreg.report.run_facts import RunFacts
from hf_vicreg.training.images.sources import ImageSource, load_sources
from hf_vicreg.training.run.places import BUILT_IN, data_setting

MAX_BANK, MAX_HELD_OUT = 2000, 1000  # images that are encoded
SPLITS = ("train", "test", "validation")


@dataclass(frozen=True)
class ReportImages:
    """Images of a report.

    Attributes:
        train: To draw views of and to look for neighbours among.
        held_out: To look at: of the split beside the training images, or the same ones.
        is_apart: Whether the held-out images are others than the training images.
        word: What stands for them in a command.
        all_held_out: How many there are where not all are looked at.
    """

    train: ImageSource
    held_out: ImageSource
    is_apart: bool
    word: str
    all_held_out: int

    @property
    def label_names(self) -> list[str] | None:
        """The classes' names, by index; None without labels."""
        labels = self.held_out.labels
        if labels is None:
            return None
        known = self.held_out.label_names or self.train.label_names or []
        count = 1 + max([*labels, *(self.train.labels or [])])
        return [one_line(known[index]) if index < len(known) else str(index) for index in range(count)]

    def name_of(self, index: int) -> str:
        """Return what one of the held-out images is called: its place in the folder, its class, or its row."""
        names, labels = self.label_names, self.held_out.labels
        place = one_line(self.held_out.describe(index))
        return place if names is None or labels is None else f"{names[labels[index]]} ({place})"


def open_images(data: str | None, facts: RunFacts) -> ReportImages | None:
    """Return the images at hand, None if there are none.

    Args:
        data: A folder of images, a `datasets` folder, a Hub id or `digits`; None: the built-in images if the run was
            trained on them. No place that a recipe names is looked at: a folder may be somebody else's.
        facts: Of the run.

    Raises:
        InputError: Nothing to read there.
    """
    name = data or facts.dataset
    if name is None:
        return None
    setting = data_setting(name, {})
    folder = setting.get("train_dir")
    if folder is not None and any((Path(folder) / split).is_dir() for split in SPLITS):
        setting = {"dataset_name": folder}  # splits, and in each a folder a class
    train, test = _numbered(*load_sources(**setting))
    held_out = train if test is None else test
    word = name if name == BUILT_IN or not Path(name).exists() else "IMAGES"
    return ReportImages(
        train=train,
        held_out=subset(held_out, spread(len(held_out), MAX_HELD_OUT)),
        is_apart=test is not None,
        word=word,
        all_held_out=len(held_out),
    )


def _numbered(train: ImageSource, test: ImageSource | None) -> tuple[ImageSource, ImageSource | None]:
    """Return the images with labels that count up from 0: integers with gaps, such as ids, become names of classes."""
    sources = [one for one in (train, test) if one is not None and one.labels is not None]
    found = sorted({label for one in sources for label in one.labels or []})
    if any(one.label_names for one in sources) or found == list(range(len(found))):
        return train, test
    number, names = {label: index for index, label in enumerate(found)}, [str(label) for label in found]
    renamed = [
        one
        if one is None or one.labels is None
        else replace(one, labels=[number[label] for label in one.labels], label_names=names)
        for one in (train, test)
    ]
    assert renamed[0] is not None
    return renamed[0], renamed[1]


def spread(length: int, most: int) -> list[int]:
    """Return at most `most` places, spread evenly over all."""
    count = min(length, most)
    return [place * length // count for place in range(count)]


def subset(source: ImageSource, places: Sequence[int]) -> ImageSource:
    """Return a source of the images at some places."""
    chosen = source.select(places)
    return replace(chosen, file_names=chosen.file_names or [f"row {place}" for place in places])


def readable(source: ImageSource, wanted: int) -> dict[int, Image.Image]:
    """Return up to `wanted` images that can be read, by their place, spread over the source and over its classes."""
    found: dict[int, Image.Image] = {}
    for place in _by_class(source, wanted):
        if len(found) == wanted:
            break
        image = source.read(place)
        if image is not None:
            found[place] = image
    return found


def _by_class(source: ImageSource, wanted: int) -> list[int]:
    """Return places to try, one of each class first where there are labels."""
    tried = spread(len(source), 4 * wanted)
    if source.labels is None:
        return tried[::4] + [place for at, place in enumerate(tried) if at % 4]
    firsts: dict[int, int] = {}
    for place, label in enumerate(source.labels):
        firsts.setdefault(label, place)
    chosen = [firsts[label] for label in sorted(firsts)]
    chosen = [chosen[place] for place in spread(len(chosen), wanted)]
    return [*chosen, *(place for place in tried if place not in chosen)]
