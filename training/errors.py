"""The errors that have a meaning of their own: bad input, a full disk, a run that was asked to stop."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InputError(ValueError):
    """Bad input, told in one line: the field, what was found, what was expected, the remedy. Exit code 2."""


class RelayedError(InputError):
    """Bad input that another process met, which says so itself."""


class RunStopped(Exception):  # noqa: N818 - it went as it was asked to go
    """The run was asked to stop, has written a checkpoint, and can be resumed. Exit code 75."""


@contextmanager
def as_input_error(field: str) -> Iterator[None]:
    """Turn the errors that configurations raise about their own fields into an `InputError` naming the section."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        strict = _is_of(error, "huggingface_hub.errors", "StrictDataclassError")
        if not strict and not isinstance(error, ValueError | TypeError):
            raise
        # a strict dataclass wraps the reason in a headline; the last line is the reason
        reason = str(error).strip().splitlines()[-1].strip()
        raise InputError(f"`{field}`: {reason.removeprefix('ValueError: ').removeprefix('TypeError: ')}") from error


@contextmanager
def room_in(folder: Path) -> Iterator[None]:
    """Turn a full disk, a quota or a limit on the size of files into an `InputError`; other errors pass."""
    try:
        yield
    except Exception as error:
        number = None
        if isinstance(error, OSError):
            number = error.errno
        elif _is_of(error, "safetensors", "SafetensorError"):
            number = _system_error(str(error))
        if number not in NO_ROOM:
            raise
        raise InputError(
            f"`output_dir`: expected room to write in {folder}, got {errno.errorcode[number]} (no space left); "
            "checkpoints written before are intact: make room and go on with --resume_from_checkpoint latest."
        ) from error


def _system_error(message: str) -> int | None:
    """Return the errno in a safetensors error's text, which has no field for it."""
    return next(
        (number for number in NO_ROOM if f"code: {number}," in message or f"os error {number})" in message), None
    )


def _is_of(error: Exception, module: str, name: str) -> bool:
    """Return whether an error is of a class of another package, without importing it: if it is, it was imported."""
    found = sys.modules.get(module)
    return found is not None and isinstance(error, getattr(found, name))
