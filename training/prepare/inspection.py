"""A whole set of images, read before a run, by `hf-vicreg inspect images`: sizes, kinds, copies, what is skipped."""

import hashlib
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from hf_vicreg.model_cards.escaping import one_line  # names of files are somebody else's text
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.channels.channel_source import ChannelSource
from hf_vicreg.training.images.channels.folders import channel_folder
from hf_vicreg.training.images.decoding import Header, UnusableImage, decode, read_header, unusable
from hf_vicreg.training.images.image_source import ImageSource
from hf_vicreg.training.images.sources import load_sources
from hf_vicreg.training.images.unusable import grouped_lines
from hf_vicreg.training.launch.cores import usable_cores
from hf_vicreg.training.monitor.progress import Progress
from hf_vicreg.training.run.places import IMAGE_SUFFIXES, SCIENCE_SUFFIXES, data_setting, files_below

AT_ONCE = 256  # images handed to the threads
NUM_NAMED = 5
BOUNDS = (32, 64, 128, 224, 384, 512, 768, 1024, 2048)  # of the histogram of short sides, in pixels
BAR = 30  # characters of its longest bar
BITS = {"1": "1 bit", "F": "32-bit float", "I": "32 bits"}


@dataclass(frozen=True)
class Facts:
    """What was found out of one image.

    Attributes:
        name: What a user finds it by.
        digest: Of its bytes; None if they could not be read.
        header: Size and kind; None if even that cannot be told.
        refusal: Why it cannot be used; None if it can.
    """

    name: str
    digest: str | None
    header: Header | None
    refusal: UnusableImage | None


def inspect_images(
    name: str,
    *,
    patch_size: int | None = None,
    image_size: int | None = None,
    num_threads: int | None = None,
    num_channels: int | None = None,
    **columns: Any,
) -> dict[str, Any]:
    """Read every image of a set and return what `report` turns into text.

    Args:
        name: Folder of images, local `datasets` folder, Hub id, or `digits`.
        patch_size: Smaller images are counted as unusable.
        image_size: Images with a shorter side are counted: they would be enlarged.
        num_channels: Read images of a folder with so many channels, in their own depth, instead of as RGB.
        num_threads: That read and decode; default: as many as this process may use cores.
        columns: `dataset_config_name`, `train_split`, `image_column_name`, `label_column_name` as in `load_sources`.

    Raises:
        InputError: Nothing to read there, or a size below 1.
    """
    for key, value in (("patch_size", patch_size), ("image_size", image_size), ("num_proc", num_threads)):
        if value is not None and value < 1:
            raise InputError(f"`{key}`: expected at least 1, got {value}.")
    where = data_setting(name, {}, held_out=True)
    if num_channels is not None:
        if "train_dir" not in where:
            raise InputError(f"`num_channels`: expected a folder of image files beside it, got {name!r}.")
        source: ImageSource = channel_folder(name, num_channels)
    else:
        source = load_sources(**where, **({} if "train_dir" in where else columns))[0]
    if patch_size is not None:
        source = source.at_least(patch_size, patch_size)
    suffixes = IMAGE_SUFFIXES if num_channels is None else IMAGE_SUFFIXES | SCIENCE_SUFFIXES
    others = _others(where["train_dir"], suffixes) if "train_dir" in where else {}
    return summarised(source, _read_all(source, num_threads), image_size, others)


def facts_of(source: ImageSource, index: int) -> Facts:
    """Return what one image is, read once and decoded."""
    name = source.describe(index)
    if isinstance(source, ChannelSource):
        refusal, digest = source.refusal(index), source.digest(index).hex()
        return Facts(name, digest, None if refusal else source.header(index), refusal)
    try:
        encoded = source.read_bytes(index)
    except Exception as error:  # of a disk, of a table
        return Facts(name, None, None, unusable(error))
    digest, header = hashlib.sha256(encoded).hexdigest(), None
    try:
        header = read_header(BytesIO(encoded))
        decode(encoded, source.min_size, lambda width, height: 8)
    except UnusableImage as error:
        return Facts(name, digest, header, error)
    return Facts(name, digest, header, None)


def summarised(
    source: ImageSource, facts: Iterable[Facts], image_size: int | None, others: dict[str, int]
) -> dict[str, Any]:
    """Return counts of all images as plain data, ready for JSON.

    Args:
        source: Where they come from.
        facts: One an image.
        image_size: See `inspect_images`.
        others: Files in the folder that are no images, by suffix.
    """
    modes: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    heights, widths = [], []
    copies: dict[str, list[str]] = {}
    skipped = []
    for index, one in enumerate(facts):
        if one.digest is not None:
            copies.setdefault(one.digest, []).append(one.name)
        if one.refusal is not None:
            reason = {"kind": one.refusal.kind, "reason": str(one.refusal)}
            skipped.append({"index": index, "name": one.name, **reason})
        elif one.header is not None:
            modes[one.header.mode] += 1
            formats[one.header.format] += 1
            heights.append(one.header.height)
            widths.append(one.header.width)
    short = [min(size) for size in zip(heights, widths, strict=True)]
    groups = [names for names in copies.values() if len(names) > 1]
    return {
        "name": source.name,
        "num_images": len(source),
        "usable": len(short),
        "height": _spread(heights),
        "width": _spread(widths),
        "short_side": _spread(short),
        "short_sides": _histogram(short),
        "image_size": image_size,
        "below_image_size": None if image_size is None else sum(side < image_size for side in short),
        "modes": dict(modes.most_common()),
        "formats": dict(formats.most_common()),
        "duplicates": groups,
        "labels": _labels(source),
        "other_files": others,
        "skipped": skipped,
    }


def report(found: dict[str, Any]) -> str:
    """Return what `inspect_images` found as text."""
    lines = [f"{one_line(found['name'])}: {found['num_images']:,} images, {found['usable']:,} usable"]
    if found["usable"]:
        lines.append("")
        for key in ("height", "width", "short_side"):
            spread = found[key]
            text = f"{spread['min']:,} to {spread['max']:,} pixels, median {spread['median']:,}"
            lines.append(f"{key.replace('_', ' '):12}{text}")
        most = max(found["short_sides"].values())
        lines += ["", "short side in pixels"]
        for bounds, count in found["short_sides"].items():
            lines.append(f"  {bounds:>12}  {count:>9,}  {'#' * -(-count * BAR // most)}")
        if found["image_size"] is not None:
            lines.append(f"  {found['below_image_size']:,} are below {found['image_size']} and would be enlarged")
        lines.append("")
        lines.append("pixels      " + ", ".join(f"{count:,} {_depth(mode)}" for mode, count in found["modes"].items()))
        lines.append("files       " + ", ".join(f"{count:,} {one}" for one, count in found["formats"].items()))
    labels = found["labels"]
    if labels is None:
        lines.append("labels      none")
    else:
        lines.append(
            f"labels      {labels['classes']} classes, {labels['fewest']:,} to {labels['most']:,} images in each"
        )
    if found["other_files"]:
        counts = ", ".join(f"{count:,} {one_line(suffix)}" for suffix, count in found["other_files"].items())
        lines.append(f"not read    files that are no images: {counts}")
    groups = found["duplicates"]
    extra = sum(len(names) - 1 for names in groups)
    lines.append(f"copies      {extra:,} images have the bytes of another one")
    lines += ["  " + one_line(" = ".join(names[:NUM_NAMED])) for names in groups[:NUM_NAMED]]
    if len(groups) > NUM_NAMED:
        lines.append(f"  and {len(groups) - NUM_NAMED:,} more groups")
    lines.append(f"skipped     {len(found['skipped']):,} images cannot be used")
    lines += [f"  {line}" for line in grouped_lines(found["skipped"])]
    return "\n".join(lines)


def _read_all(source: ImageSource, num_threads: int | None) -> Iterator[Facts]:
    """Yield the facts of all images in order, showing how far it is; Pillow decodes on several threads at once."""
    if num_threads is None:
        num_threads = usable_cores()
    progress = Progress(len(source), 0, shown=True)
    done = 0
    with ThreadPoolExecutor(num_threads) as threads:
        for start in range(0, len(source), AT_ONCE):  # or a million results would wait at once
            indices = range(start, min(start + AT_ONCE, len(source)))
            for one in threads.map(lambda index: facts_of(source, index), indices):
                done += 1
                progress.update(done)
                yield one
    progress.close()


def _others(folder: str, read: set[str]) -> dict[str, int]:
    """Return how many files of other suffixes than those read lie in a folder of images; a Zarr is one file."""
    suffixes = Counter(Path(path).suffix.lower() or "without a suffix" for path in files_below(folder, zarr=True))
    return {suffix: count for suffix, count in suffixes.most_common() if suffix not in read}


def _spread(values: list[int]) -> dict[str, int] | None:
    if not values:
        return None
    return {"min": min(values), "median": round(statistics.median(values)), "max": max(values)}


def _histogram(sides: list[int]) -> dict[str, int]:
    """Return how many short sides lie between each two bounds, from the first that holds any to the last."""
    edges = [1, *BOUNDS]
    names = [f"{low} to {high - 1}" for low, high in pairwise(edges)] + [f"{edges[-1]} and more"]
    counts = Counter(sum(side >= edge for edge in edges) - 1 for side in sides)
    return {names[place]: counts[place] for place in range(min(counts), max(counts) + 1)} if counts else {}


def _labels(source: ImageSource) -> dict[str, int] | None:
    if source.labels is None:
        return None
    counts = Counter(source.labels).values()
    return {"classes": len(counts), "fewest": min(counts), "most": max(counts)}


def _depth(mode: str) -> str:
    if " x " in mode:  # channels and depth
        return mode
    return f"{mode} ({'16 bits' if mode.startswith('I;16') else BITS.get(mode, '8 bits')})"
