"""Where a run reads and writes: its images, as people name them, and its folder; checked before anything heavy."""

import difflib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.run.run_folder import RECIPE, refuse_foreign_folder

RUNS = Path("runs")
NUM_LISTED = 3
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
BUILT_IN = "digits"
EMBEDDING_FILE = "embedding.json"  # in a folder of embeddings
SHARD_SUFFIXES = (".tar", ".parquet")
IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
TIFF = {".tif", ".tiff"}
HELD_OUT = {"dev", "eval", "evaluation", "test", "testing", "val", "valid", "validation"}
SCIENCE_SUFFIXES = {".dcm", ".jp2", ".npy", ".zarr"}  # read by channels; an OME-Zarr is a folder


def is_shards(name: str) -> bool:
    """Return whether a name is that of shards of images, tars or parquet: a file, an address or a pattern of them."""
    return re.split(r"[?#]", name)[0].lower().endswith(SHARD_SUFFIXES) and not os.path.isdir(name)


def refuse_credentials(address: str, field: str) -> None:
    """Raise InputError for an address of shards that holds what nobody should read: it would be written down."""
    if re.search(r"://[^/]*@|[?#]", address):
        raise InputError(
            f"`{field}`: expected an address of shards without credentials, it holds some; give them to the store's "
            "own library, by its environment variables or files."
        )


def data_setting(data: str, given: dict[str, Any], field: str = "data", *, held_out: bool = False) -> dict[str, str]:
    """Return images named by one word as `train_dir`, a folder of images, or `dataset_name`, anything else.

    Args:
        data: A folder of image files, a `datasets` folder, a Hub id, or `digits`.
        given: The other settings.
        field: What named it, for errors.
        held_out: A folder of photographs in `train` beside `test` or `validation` is a `datasets` folder as well: what
            is held out there is not to be trained on, and folders of classes in them are labels.

    Raises:
        InputError: Images are named there as well, a folder without a file, or neither a folder nor a Hub id.
    """
    for key in ("train_dir", "dataset_name"):
        if given.get(key):
            raise InputError(f"`{field}`, `{key}`: expected one of the two, got {data!r} and {given[key]!r}.")
    if os.path.isdir(data):
        refuse_empty(data, field)
        as_it_is = is_image_folder(data) and not (held_out and _has_splits(data))
        return {"train_dir" if as_it_is else "dataset_name": data}
    if data != BUILT_IN and not HUB_ID.fullmatch(data):
        raise InputError(
            f"`{field}`: expected a folder of images, a `datasets` folder, a Hub id OWNER/NAME or '{BUILT_IN}', got "
            f"{data!r}{_instead(data)}"
        )
    return {"dataset_name": data}


def with_places(settings: dict[str, Any]) -> dict[str, Any]:
    """Return explicit settings with a folder for the run if none is named; what they name is looked for.

    Raises:
        InputError: No images by that name, a folder that cannot be the run's, or no folder where none can be chosen.
    """
    images = settings.get("train_dir") or settings.get("dataset_name") or ""
    if all(os.path.isfile(os.path.join(images, name)) for name in (RECIPE, "log.jsonl")):
        raise InputError(
            f"`data`: expected images, got {images!r}, the folder of a run; name its images, and add "
            f"--model_name_or_path {images} to begin with its weights."
        )
    if is_shards(images):  # looked for when they are listed
        pass
    elif settings.get("train_dir"):
        if not os.path.isdir(images):
            raise InputError(f"`train_dir`: expected a folder of images, got {images!r}{_instead(images)}")
    elif os.path.isfile(images):
        raise InputError(f"`dataset_name`: expected a folder or a Hub id, got {images!r}, which is a file.")
    elif not os.path.exists(images) and _is_path(images):
        raise InputError(f"`dataset_name`: expected a Hub id or an existing folder, got {images!r}{_instead(images)}")
    if os.path.isdir(images):
        refuse_empty(images, "train_dir" if settings.get("train_dir") else "dataset_name")
    resuming = settings.get("resume_from_checkpoint") is not None
    if not settings.get("output_dir"):
        settings = settings | {"output_dir": str(_new_folder(images, resuming=resuming))}
    refuse_foreign_folder(Path(settings["output_dir"]), RECIPE, resuming=resuming)
    return settings


def refuse_empty(folder: str, field: str) -> None:
    """Raise InputError for a folder that no file lies in or below, before anything heavy is imported to read it."""
    if not any(True for _ in files_below(folder, zarr=True)):
        raise InputError(f"`{field}`: expected files of images in {folder}, found no file; name another folder.")


def absence(name: str) -> str | None:
    """Say that what a name means, a path, is not there or not finished; None where it may be a Hub id."""
    if os.path.isfile(os.path.join(name, RECIPE)) and not os.path.isfile(os.path.join(name, "config.json")):
        return ", a run that has not come to its end; let it go on with --resume_from_checkpoint latest."
    return None if os.path.exists(name) or not _is_path(name) else _instead(name)


def _is_path(name: str) -> bool:
    """Whether a name that is no folder here was meant as one: it is no Hub id, or begins with a folder of here."""
    first, slash, _ = name.partition("/")
    return bool(slash) and (not HUB_ID.fullmatch(name) or os.path.isdir(first))


def _instead(name: str) -> str:
    """Say what is wrong with a path, and what lies beside it by nearly that name."""
    if os.path.isfile(name):
        return ", which is a file."
    folder, last = os.path.split(os.path.abspath(name))
    beside = [one.name for one in os.scandir(folder) if one.is_dir()] if os.path.isdir(folder) else []
    close = difflib.get_close_matches(last, beside, n=1)
    remedy = f"; did you mean {os.path.join(os.path.dirname(name), close[0])!r}?" if close else "."
    return f", which does not exist{remedy}"


def _new_folder(images: str, *, resuming: bool) -> Path:
    """Return `runs/NAME-DATE` for a run on these images, a folder that does not exist yet."""
    if resuming:
        runs = sorted(RUNS.glob(f"*/{RECIPE}"), key=lambda path: path.stat().st_mtime, reverse=True)
        newest = ", ".join(str(path.parent) for path in runs[:NUM_LISTED])
        remedy = f"the newest are {newest}" if newest else f"there is none below {RUNS}"
        raise InputError(f"`output_dir`: expected the folder of the run to resume, got none; {remedy}.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "`output_dir`: expected a folder that all processes write to, got none; add --output_dir FOLDER."
        )
    name = re.sub(r"[^\w.-]+", "-", os.path.basename(os.path.abspath(images))).strip("-.") or "images"
    folder = RUNS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


def lacks_processor(place: str, field: str) -> bool:
    """Return whether a model's folder or repository has no image processor of its own.

    Args:
        place: Folder or Hub id.
        field: What named it, for errors.

    Raises:
        InputError: Neither the Hub nor the cache says so: nothing is to be taken for missing then.
    """
    lacks = [_lacks(place, file, field) for file in ("preprocessor_config.json", "processor_config.json")]
    return lacks[0]  # the other may be of texts alone, but has to be asked for


def _lacks(place: str, file: str, field: str) -> bool:
    if os.path.isdir(place):
        return not os.path.isfile(os.path.join(place, file))
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import RemoteEntryNotFoundError

    if try_to_load_from_cache(place, file) is _CACHED_NO_EXIST:
        return True
    try:
        hf_hub_download(place, file)
    except RemoteEntryNotFoundError:
        return True
    except Exception as error:  # no network, none allowed, a Hub that is busy: libraries below raise many kinds
        raise InputError(
            f"`{field}`: expected to find or miss {file} of {place}, which is not in the cache, got no answer from "
            "the Hub; try again, with the network if you work offline."
        ) from error
    return False


def is_image_folder(name: str) -> bool:
    """Return whether a path is a folder of image files; one with parquet or arrow files is a `datasets` folder."""
    suffixes = {os.path.splitext(path)[1].lower() for path in files_below(name)}
    if suffixes & {".parquet", ".arrow"}:
        return False
    return bool(suffixes & (IMAGE_SUFFIXES | SCIENCE_SUFFIXES)) or any(Path(name).rglob("*.zarr"))


def _has_splits(name: str) -> bool:
    """Whether photographs lie in folders named as `datasets` names its splits."""
    folders = {entry.name for entry in os.scandir(name) if entry.is_dir()}
    if not folders & {"train", "training"} or not folders & HELD_OUT:
        return False
    return not {os.path.splitext(path)[1].lower() for path in files_below(name)} & (SCIENCE_SUFFIXES | TIFF)


def files_below(folder: str, *, zarr: bool = False) -> Iterator[str]:
    """Yield every file below a folder; linked folders are followed, but none is entered twice.

    With `zarr` a folder `*.zarr`, which is an image, is a file as well.
    """
    entered = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        images = [name for name in folders if zarr and name.lower().endswith(".zarr")]
        folders[:] = sorted(name for name in folders if name not in images)
        yield from (os.path.join(where, name) for name in (*images, *names))
