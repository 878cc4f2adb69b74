"""transformers' own test mixins: fetched from the source distribution of the installed version, made importable.

The wheel has no tests, so the mixins come from the source distribution on the package index. They are kept in
`build/upstream/transformers-<version>/` and are never part of this repository.

Their package is called `tests` there and `transformers_upstream` here, where `tests` is taken; their imports of each
other are relative, so they do not notice. What they import besides and the distribution lacks is made up in
`add_stand_ins`: base classes without tests, a picture in place of one on the Hub, values for configurations.
"""

import importlib.metadata
import re
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGE = "transformers_upstream"
MIXINS = ("test_backbone_common", "test_configuration_common", "test_image_processing_common", "test_modeling_common")
CACHE = Path(__file__).resolve().parents[2] / "build" / "upstream"
DOWNLOAD_SECONDS = 300


def fetch() -> Path:
    """Return the folder with the package `transformers_upstream`, filled on the first call.

    Raises:
        FileNotFoundError: No package index in reach, or the source distribution lacks a mixin; one line.
    """
    version = importlib.metadata.version("transformers")
    folder = CACHE / f"transformers-{version}"
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            unpacked = Path(work) / "unpacked"
            _unpack(_download(version, Path(work)), unpacked / PACKAGE)
            _picture().save(unpacked / "picture.png")
            try:
                unpacked.rename(folder)  # in one step: several processes may be here
            except OSError:
                if not folder.is_dir():
                    raise
    return folder


def _download(version: str, target: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "transformers", "--dest", str(target), f"transformers=={version}"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
        said = (result.stderr or result.stdout).strip().splitlines()
    except subprocess.TimeoutExpired:
        said = [f"no answer in {DOWNLOAD_SECONDS} s"]
    found = sorted(target.glob("transformers-*.tar.gz"))
    if not found:
        raise FileNotFoundError(
            f"Upstream tests: expected the source distribution of transformers {version} from a package index, as "
            f"`pip download` gives it, got {said[-1] if said else 'no file'!r}; run once where an index is in reach."
        )
    return found[0]


def _unpack(archive: Path, folder: Path) -> None:
    """Copy the mixins, and nothing else of the archive, into the folder."""
    folder.mkdir(parents=True)
    top = archive.name.removesuffix(".tar.gz")
    with tarfile.open(archive) as opened:
        for name in MIXINS:
            try:
                member = opened.getmember(f"{top}/tests/{name}.py")
            except KeyError:
                raise FileNotFoundError(
                    f"Upstream tests: expected `tests/{name}.py` in {archive.name}, got none; "
                    "this version of transformers ships its tests otherwise."
                ) from None
            opened.extract(member.replace(name=f"{name}.py", deep=False), folder, filter="data")
    (folder / "__init__.py").touch()  # the distribution has none; relative imports and upstream's code need one


def _picture() -> Image.Image:
    """Return a smooth picture with shapes and a gradient: backends that resize it differ by rounding alone."""
    rows, columns = np.mgrid[0:480, 0:640] / 480
    waves = [np.sin(3 * rows + 5 * columns), np.cos(7 * rows - 2 * columns), np.hypot(rows - 0.5, columns - 0.6)]
    channels = [255 * (one - one.min()) / np.ptp(one) for one in waves]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def add_stand_ins(folder: Path) -> None:
    """Make `transformers_upstream` importable, with modules in place of those the distribution lacks."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    # exported programs and text generation have suites of their own upstream, which are not distributed
    _module(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    _module(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    _module(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs=common_fields())
    _module("fetch_hub_objects_for_ci", url_to_local_path=lambda url: str(folder / "picture.png"))


def markers(folder: Path) -> list[str]:
    """Return the names of the markers that the mixins use."""
    source = "".join(path.read_text(encoding="utf-8") for path in (folder / PACKAGE).glob("*.py"))
    return sorted(set(re.findall(r"\bmark\.(\w+)", source)) - {"parametrize", "skip", "skipif", "xfail"})


def common_fields() -> dict:
    """Return fields of every configuration with values that are not the defaults."""
    return {
        "return_dict": False,
        "output_hidden_states": True,
        "output_attentions": True,
        "dtype": "float16",
        "chunk_size_feed_forward": 5,
        "architectures": ["Example"],
        "id2label": {0: "cat", 1: "dog", 2: "other"},
        "label2id": {"cat": 0, "dog": 1, "other": 2},
        "problem_type": "regression",
        "_name_or_path": "somewhere/else",
    }


def _module(name: str, **attributes) -> None:
    parent, _, _ = name.rpartition(".")
    if parent and parent != PACKAGE and parent not in sys.modules:
        _module(parent, __path__=[])
    module = types.ModuleType(name, "A stand-in for a module that the source distribution lacks.")
    vars(module).update(attributes)
    sys.modules[name] = module


if __name__ == "__main__":
    try:
        print(fetch())
    except FileNotFoundError as error:
        sys.exit(str(error))
