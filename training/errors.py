"""The errors that have a meaning of their own: bad input, a full disk, a run that was asked to stop."""

import difflib
import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_PLACE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
)


class InputError(ValueError):
    """Bad input, told in one line: the field, what was found, what was expected, the remedy. Exit code 2."""


class RelayedError(InputError):
    """Bad input that another process met, which says so itself."""


class FullMemoryError(InputError):
    """A device or the machine has no memory left for what was asked."""


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
        if not _is_strict(error) and not isinstance(error, ValueError | TypeError):
            raise
        raise InputError(f"`{field}`: {_last_line(error)}") from error


@contextmanager
def blamed_on(field: str, expected: str = "") -> Iterator[None]:
    """Turn what libraries and models say of a user's files and values into an `InputError`; other errors pass.

    Args:
        field: What the user gave.
        expected: What was expected of it, and what was found; default: the error says so itself.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        strict = _is_strict(error)
        if not strict and not isinstance(error, ValueError | OSError):
            raise
        reason = _last_line(error) if strict else " ".join(str(error).split())[:500]
        if expected or not reason.startswith("`"):
            reason = f"`{field}`: {expected}{': ' if expected else ''}{reason}"
        raise InputError(reason) from error


@contextmanager
def place_for(field: str, place: object) -> Iterator[None]:
    """Turn a disk that is full or not to be touched, or a path that no file can have, into an `InputError`.

    It goes by the kind of error that the system names, so it may stand around much: other errors pass.
    """
    try:
        yield
    except Exception as error:
        number = _system_error(error, (*NO_ROOM, *NO_PLACE))
        if number is None:
            raise
        where = getattr(error, "filename", None) or place
        raise InputError(
            f"`{field}`: expected a path that can be used, got {str(where)!r}: {os.strerror(number)}."
        ) from error


@contextmanager
def room_in(folder: Path) -> Iterator[None]:
    """Turn a full disk, a quota or a limit on the size of files into an `InputError`; other errors pass."""
    try:
        yield
    except Exception as error:
        number = _system_error(error, NO_ROOM)
        if number is None:
            raise
        raise InputError(
            f"`output_dir`: expected room to write in {folder}, got {errno.errorcode[number]} (no space left); "
            "checkpoints written before are intact: make room and go on with --resume_from_checkpoint latest."
        ) from error


@contextmanager
def memory_to_hold() -> Iterator[None]:
    """Turn what torch and Python raise where no memory is left into a `FullMemoryError`; other errors pass."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())
        if _is_of(error, "torch", "OutOfMemoryError"):
            where = "the device's memory"
        elif isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in said:
            where = "this machine's memory"
        else:
            raise
        where += f", process {os.environ['RANK']}" if "RANK" in os.environ else ""
        raise FullMemoryError(
            f"memory: expected what is held at once to fit into {where}, it does not: "
            f"{said[:200] or 'MemoryError'}; take a smaller batch, smaller images or a smaller model. "
            "Checkpoints written before are intact."
        ) from error


def _system_error(error: Exception, numbers: tuple[int, ...]) -> int | None:
    """Return the errno of an error if it is among some; a safetensors error has it in its text alone."""
    if isinstance(error, OSError):
        return error.errno if error.errno in numbers else None
    if not _is_of(error, "safetensors", "SafetensorError"):
        return None
    said = str(error)
    return next((number for number in numbers if f"code: {number}," in said or f"os error {number})" in said), None)


def _last_line(error: Exception) -> str:
    """Return the reason of an error: a strict dataclass puts a headline before it."""
    reason = str(error).strip().splitlines()[-1].strip()
    return reason.removeprefix("ValueError: ").removeprefix("TypeError: ")


def _is_strict(error: Exception) -> bool:
    return _is_of(error, "huggingface_hub.errors", "StrictDataclassError")


def _is_of(error: Exception, module: str, name: str) -> bool:
    """Return whether an error is of a class of another package, without importing it: if it is, it was imported."""
    found = sys.modules.get(module)
    return found is not None and isinstance(error, getattr(found, name))


def log_to_stderr() -> None:
    """Show what the package logs, from one process, with nothing in it that steers a terminal."""
    from hf_vicreg.model_cards.escaping import PrintableFormatter  # names of files are text of others

    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    main_process = os.environ.get("RANK", "0") == "0"
    logging.getLogger("hf_vicreg").setLevel(logging.INFO if main_process else logging.ERROR)


def tell(error: InputError) -> None:
    """Print an error on its line, unless another process of the run prints it; each one's memory is its own."""
    from hf_vicreg.model_cards.escaping import one_line  # what others wrote may be in it

    is_main, is_first = (os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK"))
    if isinstance(error, FullMemoryError) or (is_first and (is_main or not isinstance(error, RelayedError))):
        print(f"error: {one_line(error)}", file=sys.stderr)


def hint(key: object, known: list[str]) -> str:
    """Return a sentence's end: `; did you mean ...?` if a known name is close or begins with the key, else a stop."""
    close = difflib.get_close_matches(str(key), known, n=1) or [one for one in known if one.startswith(str(key))]
    return f"; did you mean `{close[0]}`?" if close else "."
