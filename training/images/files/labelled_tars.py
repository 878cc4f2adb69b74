"""Labelled images of tars: where each one lies, and the class that WebDataset keeps beside it under the same name."""

import json
import os
import re
import tarfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.decoding import KINDS
from hf_vicreg.training.images.files.parquet_shards import SeekableShard
from hf_vicreg.training.images.files.shards import ShardFile, ShardHeader, ShardLost, list_shards, short_name
from hf_vicreg.training.images.image_source import ImageSource
from hf_vicreg.training.images.sources import fingerprinted
from hf_vicreg.training.run.places import IMAGE_SUFFIXES

CLASS, FIELDS = "cls", "json"  # suffixes of what lies beside an image
NEARLY_ALONE = 4096  # bytes beyond an image that a store is asked for
MOST_CLASSES = 1_000_000


@dataclass(frozen=True)
class TarImages:
    """Reads images by index, each from where it lies; can be pickled, for loader processes.

    Attributes:
        shards: Names of the tars.
        places: Of each image three numbers, one after the other: its tar, the byte it begins with, its bytes.
    """

    shards: Sequence[str]
    places: array

    def __call__(self, index: int) -> bytes:
        """Return an encoded image.

        Raises:
            OSError: It cannot be read.
        """
        shard, start, size = self.places[3 * index : 3 * index + 3]
        file, found = ShardFile(self.shards[shard], start, NEARLY_ALONE), b""
        try:
            while len(found) < size and (more := file.read(size - len(found))):
                found += more
        except ShardLost as error:
            raise OSError(f"{short_name(self.shards, shard)}: {error}") from error
        finally:
            file.close()
        return found


def labelled_tars(pattern: str, field: str, column: str) -> tuple[ImageSource, list[Any]]:
    """Return the images of tars and the class of each, a whole number or a name; the tars stay as they are.

    A class is the text of `NAME.cls`, or what `NAME.json` says under `column`, beside the image `NAME.jpg`.

    Args:
        pattern: As of `list_shards`, without credentials.
        field: The flag that named it, for errors.
        column: `label` looks into either, anything else into JSON alone.

    Raises:
        InputError: No tars, one that cannot be read to its end, an image without a class, or none at all.
    """
    shards = list_shards(pattern, field)
    places, names, classes = array("q"), [], []
    for shard, name in enumerate(shards):
        short = short_name(shards, shard)
        try:
            found, beside = _contents(name, column)
        except ShardLost as error:
            reason = f"{KINDS[error.kind]} ({error})"
            raise InputError(f"`{field}`: expected tars that can be read, {short} cannot be: {reason}.") from error
        for member, start, size in found:
            if _key(member) not in beside:
                raise InputError(
                    f"`{field}`: expected a class beside each image, as NAME.cls or {column!r} in NAME.json, found "
                    f"none beside {member} of {short}; name the field of JSON by --label_column_name."
                )
            places.extend((shard, start, size))
            names.append(f"{short}/{member}")
            classes.append(beside[_key(member)])
    if not names:
        raise InputError(f"`{field}`: expected images in {pattern!r}, found none.")
    kinds = {type(one) for one in classes}
    if kinds not in ({int}, {str}):
        wrong = next(one for one in classes if not isinstance(one, str))
        raise InputError(
            f"`{field}`: expected classes in {pattern!r} that are all whole numbers or all names, got {wrong!r} among "
            "others; name another field of JSON by --label_column_name."
        )
    if kinds == {int} and max(classes) >= MOST_CLASSES:
        raise InputError(
            f"`{field}`: expected classes below {MOST_CLASSES:,}, found {max(classes)}, which looks like an id; name "
            "another field of JSON by --label_column_name."
        )
    source = fingerprinted(pattern.rsplit("/", 1)[-1], len(names), TarImages(shards, places), None)
    return ImageSource(source.name, len(source), source.read_bytes, source.fingerprint, file_names=names), classes


def _contents(name: str, column: str) -> tuple[list[tuple[str, int, int]], dict[str, Any]]:
    """Name, first byte and size of a tar's images, and the classes by `_key`."""
    images, classes = [], {}
    try:
        file = SeekableShard(name)
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=ShardHeader) as tar:  # type: ignore[call-overload]
                for member in tar:
                    if member.isfile():
                        if os.path.basename(member.name).startswith("."):
                            continue  # what other systems leave there
                        if os.path.splitext(member.name)[1].lower() in IMAGE_SUFFIXES:
                            images.append((member.name, member.offset_data, member.size))
                        suffix = os.path.basename(member.name).partition(".")[2].lower()
                        if suffix == FIELDS or (suffix == CLASS and column == "label"):
                            content = tar.extractfile(member)
                            value = _class_of(b"" if content is None else content.read(), suffix, column)
                            if value is not None and (suffix == CLASS or _key(member.name) not in classes):
                                classes[_key(member.name)] = value
                    tar.members = []  # it would remember them all
        finally:
            file.close()
    except (tarfile.TarError, EOFError) as error:
        raise ShardLost("truncated" if "unexpected end" in str(error) else "damaged", str(error)) from error
    return images, classes


def _key(member: str) -> str:
    """What all members of a sample begin with: the path up to the first dot of the file's name."""
    folder, name = os.path.split(member)
    return os.path.join(folder, name.partition(".")[0])


def _class_of(content: bytes, suffix: str, column: str) -> Any:
    """A class as a whole number or text, whatever else it is; None where there is none."""
    if suffix == CLASS:
        text = content.decode(errors="replace").strip()
        return int(text) if re.fullmatch(r"\d{1,18}", text, re.ASCII) else text or None
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return found.get(column) if isinstance(found, dict) else None
