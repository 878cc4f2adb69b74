"""The one error that means: what you gave cannot work, and here is what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError


class InputError(ValueError):
    """Bad input, told in one line: the field, what was found, what was expected, the remedy. Exit code 2."""


@contextmanager
def as_input_error(field: str) -> Iterator[None]:
    """Turn the errors that configurations raise about their own fields into an `InputError` naming the section."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, StrictDataclassError) as error:
        # a strict dataclass wraps the reason in a headline; the last line is the reason
        reason = str(error).strip().splitlines()[-1].strip()
        raise InputError(f"`{field}`: {reason.removeprefix('ValueError: ').removeprefix('TypeError: ')}") from error
