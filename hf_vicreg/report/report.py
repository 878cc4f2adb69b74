"""`hf-vicreg report`: one run, or two side by side, as one HTML file."""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from hf_vicreg.model_cards.schema import FileError, check_plain, read_checked
from hf_vicreg.report import seen
from hf_vicreg.report.page import note, page, section, side_by_side
from hf_vicreg.report.run_facts import RunFacts, read_facts
from hf_vicreg.report.run_images import ReportImages, open_images
from hf_vicreg.report.space import Space, look_around
from hf_vicreg.report.told import curves_section, heading, panels_of, recipe_section
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import VisionEncoder, load_config, load_vision_encoder
from hf_vicreg.training.export import IMAGES
from hf_vicreg.training.run.run_folder import file_inside

logger = logging.getLogger(__name__)

REPORT_FILE, COMPARISON_FILE = "report.html", "comparison.html"
INDEX = "model.safetensors.index.json"
PARTS = (
    ("views", "Two views of an image", "What the model was shown of each image, and had to find alike."),
    ("neighbours", "Nearest neighbours", "A few images, and what is nearest to each by the cosine of features."),
    ("patches", "What patches mean", "Three principal components of the patches' tokens: like colours, like content."),
    ("attention", "Where attention looks", "Pick a patch: each small map is one head of one layer, looking from it."),
    ("map", "A map of the images", "Images that the encoder finds alike lie close together."),
    ("confusion", "Which classes are confused", "What the labels of the nearest images say."),
)  # fmt: skip


def write_report(*runs: str | os.PathLike, data: str | None = None, output: str | os.PathLike | None = None) -> Path:
    """Write the report of a run, or of two runs side by side, and return the file.

    Args:
        runs: Folder of a run, or of two; nothing outside them is read but `data`.
        data: Images to look at: a folder, a `datasets` folder, a Hub id or `digits`. Without them a report of a run on
            the built-in digits has those; any other one says what it lacks.
        output: File to write; default: `report.html` in the run's folder, of two `comparison.html` in the first's.

    Raises:
        InputError: Not the folder of a run, a file in it that is not what it has to be, or no images in `data`.
    """
    if not 1 <= len(runs) <= 2:
        raise InputError(f"`RUN`: expected the folder of one run or of two, got {len(runs)}.")
    facts = [read_facts(Path(run)) for run in runs]
    if len({run.name for run in facts}) < len(facts):
        facts = [replace(run, mark=mark) for run, mark in zip(facts, (" (A)", " (B)"), strict=True)]
    images = open_images(data, facts[0])
    place = Path(output) if output is not None else facts[0].folder / (REPORT_FILE, COMPARISON_FILE)[len(runs) - 1]
    if not place.absolute().parent.is_dir() or place.is_dir():
        raise InputError(f"`output`: expected a file in a folder that exists, got {place}.")
    names = " ".join(("RUN_A", "RUN_B") if len(runs) > 1 else ("RUN",))
    shown_data = f" --data {images.word}" if images is not None and data is not None else ""
    command = f"hf-vicreg report {names}{shown_data}"
    panels = panels_of(
        [run.records for run in facts], facts[0].levels, dict.fromkeys(part for run in facts for part in run.parts)
    )
    looks = [_Look(run, images, len(facts)) for run in facts]
    bodies: list[str] = []
    for part, title, lead in PARTS:
        found = [look.part(part, at) for at, look in enumerate(looks)]
        if any(one is not None for one in found):
            own = [one if one is not None else note("No labels: there is nothing to confuse.") for one in found]
            bodies.append(section(part, title, lead, side_by_side([run.name for run in facts], own), command))
    titles = {name: title for name, title, _ in PARTS if f'id="{name}"' in "".join(bodies)}
    top = heading(facts, {"training": "Training"} | titles | {"recipe": "What was run"})
    body = "".join([top, "<main>", curves_section(panels, command), *bodies, recipe_section(facts), "</main>"])
    content = {
        "runs": [run.name for run in facts],
        "panels": panels,
        "attention": [look.data.get("attention") for look in looks],
        "maps": [look.data.get("map") for look in looks],
    }
    text = page(f"{' and '.join(run.name for run in facts)}: report", body, content)
    with NamedTemporaryFile("w", dir=place.parent, suffix=".tmp", encoding="utf-8", delete=False) as file:
        try:
            file.write(text)  # aside, under a name that nothing in the folder can have taken
            file.flush()
            Path(file.name).chmod(0o644)
            Path(file.name).replace(place)
        except BaseException:
            Path(file.name).unlink()
            raise
    return place


class _Look:
    """A run's encoder and the images, as far as there are any, and what one sees of the two."""

    def __init__(self, facts: RunFacts, images: ReportImages | None, num_runs: int):
        self.facts, self.images, self.num_runs = facts, images, num_runs
        self.data: dict[str, Any] = {}
        self._space: Space | None = None
        self.encoder: VisionEncoder | None = None
        self.lack = ""
        if images is None:
            self.lack = "Needs images, and there are none at hand: hf-vicreg report RUN --data IMAGES"
        elif not (facts.folder / "config.json").exists():
            self.lack = "Needs the run's encoder, which is there when the run is finished."
        else:
            try:
                place = _encoder_folder(facts.folder)
                _refuse_links(facts.folder, place)
                channels = getattr(load_config(str(place)), "num_channels", 3)
                if channels == 3:
                    self.encoder = _of_eight_bits(load_vision_encoder(str(place)))
                else:
                    self.lack = (
                        f"Shows RGB images alone, and this encoder takes {channels} channels; hf-vicreg inspect views "
                        "shows what it sees."
                    )
            except InputError as error:
                self.lack = self._told(error)

    def part(self, name: str, at: int) -> str | None:
        """Return a part of the page as HTML, or why there is none; None where it would have nothing to say."""
        if self.encoder is None or self.images is None:
            return None if name == "confusion" else note(self.lack)
        made: dict[str, Callable[[VisionEncoder, ReportImages], str | None]] = {
            "views": lambda encoder, images: seen.views_part(self.facts, encoder, images),
            "neighbours": lambda encoder, images: seen.neighbours_part(self.space(encoder, images), images),
            "patches": seen.patches_part,
            "attention": lambda encoder, images: self._attention(encoder, images, at),
            "map": lambda encoder, images: self._map(encoder, images, at),
            "confusion": self._confusion,
        }
        logger.info("%s: %s", self.facts.name, name)
        try:
            return made[name](self.encoder, self.images)
        except InputError as error:
            return note(self._told(error))

    def space(self, encoder: VisionEncoder, images: ReportImages) -> Space:
        """Return the images in the encoder's feature space, encoded once."""
        if self._space is None:
            self._space = look_around(encoder, images, self.facts.results.get("knn_neighbours") or 20)
        return self._space

    def _attention(self, encoder: VisionEncoder, images: ReportImages, at: int) -> str:
        self.data["attention"] = seen.attention_data(encoder, images, seen.ATTENTION_BYTES // self.num_runs)
        return seen.attention_part(at)

    def _map(self, encoder: VisionEncoder, images: ReportImages, at: int) -> str:
        space = self.space(encoder, images)
        self.data["map"] = seen.map_data(space, images)
        return seen.map_part(at, space, images)

    def _confusion(self, encoder: VisionEncoder, images: ReportImages) -> str | None:
        space = self.space(encoder, images)
        return None if space.confusion is None else seen.confusion_part(space, images)

    def _told(self, error: InputError) -> str:
        """Return what an error says without where the run lies on this machine."""
        text = str(error)
        for place in (self.facts.folder, self.facts.folder.resolve()):
            text = text.replace(str(place), self.facts.name)
        return text


def _of_eight_bits(encoder: VisionEncoder) -> VisionEncoder:
    """Return an encoder of images that are shown as they are read, with 8 bits; raise InputError for another."""
    highest = max(getattr(encoder.processor, "channel_high", None) or [255.0])
    if highest > 255:
        raise InputError(f"Shows images of 8 bits alone, and this encoder takes values up to {highest:g}.")
    return encoder


def _refuse_links(run: Path, place: Path) -> None:
    """Raise InputError for a file of the model in `place`, of the run or below it, that lies outside the run."""
    names = {"config.json", "preprocessor_config.json", "model.safetensors", INDEX}
    if (place / INDEX).exists():
        try:
            shards = read_checked(file_inside(run, str(place.relative_to(run) / INDEX)), check_plain).get("weight_map")
        except FileError as error:
            raise InputError(f"`RUN`: {error}") from None
        names |= {str(one) for one in shards.values()} if isinstance(shards, dict) else set()
    for name in sorted(names):
        file_inside(run, str(place.relative_to(run) / name))


def _encoder_folder(run: Path) -> Path:
    """Return the folder of the encoder of images: of a run of captions it lies beside that of texts."""
    return run / IMAGES if (run / IMAGES / "config.json").is_file() else run
