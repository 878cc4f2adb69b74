"""The Space of a published model: its app, card and pictures in a folder of their own.

Pictures of the user's leave the machine only if a folder of them was named for it; they are made small, written anew
and numbered: no name, no metadata comes along. Otherwise patterns are drawn.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from hf_vicreg.hub_space.pictures import fitted
from hf_vicreg.model_cards.card import CardFacts
from hf_vicreg.model_cards.escaping import code, one_line, prose, python_string
from hf_vicreg.publishing.checks import TIMEOUT_S, clean_environment, import_path
from hf_vicreg.publishing.drawn_pictures import drawn_pictures
from hf_vicreg.publishing.secret_scan import refuse_secrets
from hf_vicreg.publishing.staging import Staged, StagedFiles
from hf_vicreg.training.errors import InputError

if TYPE_CHECKING:
    from hf_vicreg.publishing.push import Remote

MOST_PICTURES, SIDE = 48, 256  # of the user's; larger side in pixels
APP = "hub_space"
GENERATED = re.compile(rf"{APP}/[^/]+|pictures/\d{{3}}\.png")
REQUIRED = ("torch", "transformers", "pillow", "starlette", "uvicorn")
SHARED = ("page.css", "page.js", "attention.js")  # of the report's page
DRAWN = "Patterns that were drawn for this page, none of them from the training images."
CHOSEN = "Pictures that were chosen for this page by whoever published the model."


@dataclass(frozen=True)
class StagedSpace(StagedFiles):
    """A Space ready to be published.

    Attributes:
        folder: Where its files lie.
        repo: Its id, which is the model's.
        names: Names of the files, relative, with `/` between folder and file, in order: these leave, and no others
            that come to lie there.
    """

    folder: Path
    repo: str
    names: list[str]

    @property
    def generated(self) -> re.Pattern[str]:
        """Names of a repository that publishing may take away."""
        return GENERATED

    def pin(self, commit: str) -> None:
        """Let the app load the model of this commit."""
        path = self.folder / "model.json"
        _write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"revision": commit})

    def keep_card(self, published: str | None) -> None:
        """Take the card of the Space on the Hub, which people may have edited, once it is one of this model."""
        if self._is_named_in(published):
            (self.folder / "README.md").write_text(published or "", encoding="utf-8")

    def refuse_another(self, remote: "Remote") -> None:
        """Refuse to take the place of an app that is not of this model.

        Raises:
            InputError: The Space has files, and a card that does not name the model.
        """
        if set(remote.files) - {"README.md", ".gitattributes"} and not self._is_named_in(remote.card):
            raise InputError(
                f"`space`: expected no Space {remote.repo}, or one whose card names the model, it has another app; "
                "name the model below `models:` in its card, or publish under another name."
            )

    def _is_named_in(self, card: str | None) -> bool:
        return f"- {self.repo}" in (line.strip() for line in (card or "").splitlines())


def stage_space(staged: Staged, into: Path, *, images: Path | None, endpoint: str) -> StagedSpace:
    """Write the Space of a staged model into an empty folder.

    Args:
        staged: The model.
        into: An empty folder.
        images: Folder of the images to publish with it; None: none of the user's, patterns are drawn.
        endpoint: Address of the Hub, for the link to the model.

    Raises:
        InputError: A model that the app cannot show, no images in the folder, or something secret in a file.
    """
    config, repo = staged.facts.config, staged.facts.repo_id
    assert repo is not None
    if staged.facts.is_dual or config.get("num_channels", 3) != 3:
        raise InputError("`space`: expected an encoder of images of three colours, got another; publish it without.")
    pictures = drawn_pictures() if images is None else _pictures_of(images)
    (into / "pictures").mkdir()
    for number, picture in enumerate(pictures, 1):
        picture.save(into / "pictures" / f"{number:03d}.png", optimize=True)
    _copy_app(into)
    lines = ["--extra-index-url https://download.pytorch.org/whl/cpu", *_requirements()]
    (into / "requirements.txt").write_text("\n".join(lines) + "\n")
    link = f"{endpoint}/{repo}"
    origin = DRAWN if images is None else CHOSEN
    _write_json(into / "model.json", {"model": repo, "revision": None, "link": link, "pictures": origin})
    (into / "README.md").write_text(space_card(staged.facts, link), encoding="utf-8")
    names = sorted(path.relative_to(into).as_posix() for path in into.rglob("*") if path.is_file())
    refuse_secrets(into, names)
    return StagedSpace(into, repo, names)


def space_card(facts: CardFacts, link: str) -> str:
    """Return the card of a Space, with the settings that the Hub reads at its top.

    Args:
        facts: Of the model.
        link: The address of the model's page.
    """
    return (
        f"---\ntitle: {python_string(facts.name)}\nemoji: \N{EYE}\ncolorFrom: green\ncolorTo: purple\nsdk: docker\n"
        f"app_port: 7860\nmodels:\n- {facts.repo_id}\npinned: false\n---\n\n# {prose(facts.name)}\n\n"
        f"What [{prose(facts.repo_id)}]({link}) sees: features of patches as colours, nearest neighbours by its "
        "features, and its attention from any patch, head by head.\n\n"
        "A visitor's pictures are sent to this Space, looked at in memory and not kept. Where those that came along "
        "are from, the page says.\n\n"
        f"The model's code is loaded from its repository, at the commit that `model.json` names. Of a private model, "
        f"add the secret {code('HF_TOKEN')}, a token that may read it, in the settings of this Space.\n\n"
        f"To run it elsewhere: {code('pip install -r requirements.txt')}, then {code(f'python -m {APP}.app')}.\n"
    )


def check_space(space: StagedSpace, model: Path) -> None:
    """Run the app over all its pictures where this package cannot be imported.

    Args:
        space: The Space.
        model: The folder of the staged model.

    Raises:
        InputError: It does not run.
    """
    program = resources.files("hf_vicreg.publishing") / "space_program.py"
    path = [str(space.folder), *import_path(space.folder, model)]
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-IB", str(program), json.dumps(path), "--check", "--model", str(model.resolve())]
        try:
            finished = subprocess.run(
                command,
                env=clean_environment(scratch),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                cwd=scratch,
            )
        except subprocess.TimeoutExpired:
            raise InputError(f"`space`: expected the app to start within {TIMEOUT_S} s, it did not.") from None
    if finished.returncode:
        reason = (finished.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"`space`: expected a model that the app can show, got: {one_line(reason)[:500]}")


def _pictures_of(folder: Path) -> list[Image.Image]:
    """Return small copies of images of a folder, spread evenly over it, pixels alone."""
    from hf_vicreg.training.images.sources import load_sources
    from hf_vicreg.training.run.places import is_image_folder

    if not folder.is_dir() or not is_image_folder(str(folder)):
        raise InputError(f"`space_images`: expected a folder of images that may be published, got {str(folder)!r}.")
    source = load_sources(train_dir=str(folder))[0]
    count = min(len(source), MOST_PICTURES)
    read: list[Any] = [source.read(at * len(source) // count) for at in range(count)]
    found = [fitted(image, SIDE) for image in read if image is not None]
    if not found:
        raise InputError(f"`space_images`: expected images that can be read in {folder}, found none.")
    return [Image.frombytes("RGB", image.size, image.tobytes()) for image in found]


def _requirements() -> list[str]:
    """Return what the app needs, at the versions that it is checked with here."""
    try:
        return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in REQUIRED]
    except metadata.PackageNotFoundError as error:
        raise InputError(
            f"`space`: expected {error.name} to be installed; pip install 'hf-vicreg[explore]'."
        ) from error


def _copy_app(into: Path) -> None:
    (into / APP).mkdir()
    own = resources.files("hf_vicreg.hub_space")
    for file in sorted(own.iterdir(), key=lambda one: one.name):
        if file.name.endswith((".py", ".css", ".html", ".js")):
            (into / APP / file.name).write_bytes(file.read_bytes())
    for name in SHARED:
        (into / APP / name).write_bytes((resources.files("hf_vicreg.report") / name).read_bytes())
    (into / "Dockerfile").write_bytes((own / "Dockerfile").read_bytes())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
