"""Shards of images, on a disk or in a store: their list, and each tar read once from front to back.

A fault of the network is not the end of a shard: what could not be read is asked for again, from the byte where it
failed. A shard that stays silent, or whose next header is no header, is given up with a reason.
"""

import logging
import os
import re
import tarfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.run.places import IMAGE_SUFFIXES

logger = logging.getLogger(__name__)

MOST_SHARDS = 1_000_000
TRIES = 6  # of the same byte, before a shard is given up
FIRST_PAUSE_S = 0.1  # before the second try; twice as long before each other one
READ_AHEAD = 2**20  # bytes asked of a store at once
REFUSED = {401, 403}  # what HTTP answers to whoever may not read


class ShardLost(Exception):  # noqa: N818 - the others are read on
    """The rest of a shard cannot be read.

    Attributes:
        kind: A key of `decoding.KINDS`.
    """

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Member:
    """An encoded image of a shard.

    Attributes:
        offset: Where it begins, to read on from: a byte of a tar, a row of a table.
        content: The file's bytes.
    """

    offset: int
    content: bytes


def list_shards(pattern: str, field: str = "dataset_name") -> list[str]:
    """Return the shards that a pattern names, in its order.

    Args:
        pattern: A path or an address that ends in `.tar` or `.parquet`. `{000..123}` and `{a,b}` stand for each of
            several words, `*` for what is found there.
        field: What named it, for errors.

    Raises:
        InputError: A pattern that names none, a store that cannot be asked, or too many.
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_words(part) if place % 2 else [part] for place, part in enumerate(parts)]
    count = 1
    for words in choices:
        count *= len(words)
    if count > MOST_SHARDS:
        raise InputError(f"`{field}`: expected at most {MOST_SHARDS:,} shards, got {count:,} by {pattern!r}.")
    named = ["".join(words) for words in product(*choices)]
    if "*" not in pattern:
        return named
    found = [one for name in named for one in _found(name)]
    if not found:
        raise InputError(f"`{field}`: expected shards, found none by {pattern!r}.")
    return found


def _words(text: str) -> list[str]:
    between = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if between is None:
        return text.split(",")
    first, last = between.groups()
    width = len(first) if first.startswith("0") else 0
    if not 0 <= int(last) - int(first) < MOST_SHARDS:
        raise InputError(f"`dataset_name`: expected {{FIRST..LAST}} with FIRST before LAST, got {{{text}}}.")
    return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]


def _found(pattern: str) -> list[str]:
    import fsspec

    try:
        system, place = fsspec.core.url_to_fs(pattern)
        names = sorted(system.glob(place))
        return [system.unstrip_protocol(one) for one in names] if "://" in pattern else names
    except Exception as error:  # each store raises its own
        raise refused(pattern, error) from error


def refused(name: str, error: BaseException) -> InputError:
    """Return why a store cannot be read, in a line; what its library says may hold credentials and is left out."""
    if isinstance(error, ImportError | ValueError) and "://" in name:
        return InputError(
            f"`dataset_name`: expected a store that can be read, nothing installed reads {name.split('://')[0]}://; "
            "pip install 'hf_vicreg[shards]'."
        )
    if _may_not(error):
        return InputError(
            f"`dataset_name`: {name} refuses to be read ({type(error).__name__}); give credentials to the store's own "
            "library, by its environment variables or files."
        )
    return InputError(f"`dataset_name`: expected shards that can be read, {name} cannot be: {_reason(error)}.")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _may_not(error: BaseException) -> bool:
    """Whether an error says that credentials are missing or wrong."""
    for one in _causes(error):
        if isinstance(one, PermissionError) or "Credential" in type(one).__name__:
            return True
        if {getattr(one, "status", None), getattr(getattr(one, "response", None), "status_code", None)} & REFUSED:
            return True
    return False


def _reason(error: BaseException) -> str:
    """Return an error's kind and number; its text may hold an address that was signed."""
    numbers = [getattr(one, name, None) for one in _causes(error) for name in ("status", "errno")]
    number = next((one for one in numbers if isinstance(one, int) and one), None)
    return type(error).__name__ + ("" if number is None else f" {number}")


class ShardFile:
    """A shard from some byte on, for `tarfile` to read; what fails is tried again.

    A store whose library knows no seeking is read from its beginning and what comes before is thrown away.
    """

    def __init__(self, name: str, start: int = 0, ahead: int = READ_AHEAD):
        """Read `ahead` bytes of a store beyond what is asked for."""
        self.name, self.position, self.ahead = name, start, ahead
        self.tries = TRIES if "://" in name else 1
        self.file: Any = None

    def read(self, size: int) -> bytes:
        """Return the next bytes, at most `size`, none at the end.

        Raises:
            ShardLost: They cannot be read.
            InputError: Credentials are missing, or a library.
        """
        for attempt in range(self.tries):
            if attempt:
                time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
            try:
                if self.file is None:
                    self.file = self._opened()
                found = self.file.read(size)
            except InputError:
                raise
            except Exception as error:  # each store raises its own
                self.close()
                if _may_not(error):
                    raise refused(self.name, error) from error
                last = error
                continue
            self.position += len(found)
            return found
        kind = "missing" if isinstance(last, FileNotFoundError) else "unreadable"
        raise ShardLost(kind, _reason(last)) from last

    def _opened(self) -> Any:
        import fsspec

        if "://" not in self.name:
            file: Any = open(self.name, "rb")  # noqa: SIM115 - closed by `close`
        else:
            try:
                system, path = fsspec.core.url_to_fs(self.name)
            except (ImportError, ValueError) as error:
                raise refused(self.name, error) from error
            # what it remembers of a file may be what a fault has left
            system.invalidate_cache(path)
            file = system.open(path, "rb", block_size=self.ahead, cache_type="readahead")
        if self.position:
            try:
                file.seek(self.position)
            except Exception:  # each library has its own way to say that it cannot
                left = self.position
                while left:
                    skipped = len(file.read(min(left, READ_AHEAD)))
                    if not skipped:
                        raise
                    left -= skipped
        return file

    def close(self) -> None:
        """Close what is open; it opens again when it is read."""
        file, self.file = self.file, None
        if file is not None:
            file.close()


class ShardHeader(tarfile.TarInfo):
    """A header; one that is none ends the tar with its reason, not as if nothing came behind it."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "ShardHeader":
        try:
            return super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise ShardLost("damaged", f"a header is broken ({error})") from error


def members(
    name: str, start: int = 0, column: str = "", suffixes: Collection[str] = IMAGE_SUFFIXES
) -> Iterator[Member]:
    """Yield the images of a shard from one of them on.

    Args:
        name: Path or address.
        start: The `offset` of an image.
        column: Of images in a table, as of `parquet_members`.
        suffixes: Of a tar's files that are images, in small letters.

    Raises:
        ShardLost: The rest cannot be read.
        InputError: Credentials are missing, or a library.
    """
    if name.lower().endswith(".tar"):
        return _tar_members(name, start, suffixes)
    from hf_vicreg.training.images.files.parquet_shards import parquet_members

    return parquet_members(name, start, column)


def _tar_members(name: str, start: int, suffixes: Collection[str]) -> Iterator[Member]:
    file = ShardFile(name, start)
    try:
        with tarfile.open(fileobj=file, mode="r|", tarinfo=ShardHeader) as tar:  # type: ignore[call-overload]
            for member in tar:
                if member.isfile() and os.path.splitext(member.name)[1].lower() in suffixes:
                    content = tar.extractfile(member)
                    yield Member(start + member.offset, b"" if content is None else content.read())
                tar.members = []  # it would remember them all
    except (tarfile.TarError, EOFError) as error:
        kind = "truncated" if "unexpected end" in str(error) else "damaged"
        raise ShardLost(kind, str(error)) from error
    finally:
        file.close()


def short_name(shards: Sequence[str], index: int) -> str:
    """Return what a user finds a shard by."""
    return shards[index].rsplit("/", 1)[-1]
