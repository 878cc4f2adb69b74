"""What the Hub or the network answers, as one line that names what to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import get_session

from hf_vicreg.training.errors import InputError

# errors of connections are httpx's, and which of its releases huggingface_hub is built on differs between versions
TRANSPORT_ERROR = HfHubHTTPError.__bases__[0]
REMEDIES = {
    401: "the token is not accepted; log in again with `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there; use one with write access to it",
    404: "there is no such repository or revision, or the token may not see it",
    412: "the repository has changed meanwhile; run the command again",
    413: "a file is too large for the repository",
    429: "too many requests; wait and run the command again",
}


@contextmanager
def as_one_line(doing: str, endpoint: str) -> Iterator[None]:
    """Turn what may go wrong in an exchange with the Hub into an `InputError` of one line.

    Args:
        doing: What was being done, as the line's middle: "upload the files".
        endpoint: The Hub's address.
    """
    try:
        yield
    except LocalTokenNotFoundError:
        raise InputError(
            "`HF_TOKEN`: expected a token with write access, got none; run `hf auth login` or set HF_TOKEN."
        ) from None
    except OfflineModeIsEnabled:
        raise InputError(f"`HF_HUB_OFFLINE`: expected to reach {endpoint}, it says not to; unset it.") from None
    except HfHubHTTPError as error:
        raise InputError(_answer(doing, error)) from None
    except (TRANSPORT_ERROR, LocalEntryNotFoundError) as error:  # the latter: no answer, and no copy kept from before
        raise InputError(_silence(doing, endpoint, error)) from None
    except OSError as error:
        # hf_xet, which carries large files, raises Python's own errors, and some without the number of the system's
        if not isinstance(error, ConnectionError | TimeoutError) and error.errno is not None:
            raise
        raise InputError(_of_storage(doing, endpoint, error)) from None
    except RuntimeError as error:  # an upload in a thread; what happened there is its cause
        cause = error.__cause__
        if "CAS service error" in str(error):  # older releases of hf_xet
            raise InputError(_of_storage(doing, endpoint, error)) from None
        if isinstance(cause, HfHubHTTPError):
            raise InputError(_answer(doing, cause)) from None
        if isinstance(cause, TRANSPORT_ERROR):
            raise InputError(_silence(doing, endpoint, cause)) from None
        raise


@contextmanager
def patience(timeout_s: float) -> Iterator[None]:
    """Let no connection of huggingface_hub's stay silent for longer; by itself it would wait for ever.

    Those of hf_xet have time-outs of their own (`HF_XET_CLIENT_READ_TIMEOUT`), and are tried again.
    """
    session = get_session()
    before = session.timeout
    session.timeout = timeout_s
    try:
        yield
    finally:
        session.timeout = before


def _answer(doing: str, error: HfHubHTTPError) -> str:
    said = f" ({error.server_message.strip()})" if error.server_message else ""
    return _status(doing, error.response.status_code, said)


def _of_storage(doing: str, endpoint: str, error: Exception) -> str:
    """Return the line for an error of hf_xet's; of its text the status alone: addresses in it may be signed."""
    status = re.search(r"\((\d{3}) ", str(error))
    return _status(doing, int(status[1])) if status else _silence(doing, endpoint, error)


def _status(doing: str, status: int, said: str = "") -> str:
    remedy = REMEDIES.get(status, "run the command again: it goes on where it stopped")
    return f"`repo`: expected to {doing}, the Hub answered {status}{said}; {remedy}."


def _silence(doing: str, endpoint: str, error: Exception) -> str:
    what = type(error).__name__
    return (
        f"`repo`: expected to {doing} at {endpoint}, got no answer ({what}); check the network and run the command "
        "again: it goes on where it stopped."
    )
