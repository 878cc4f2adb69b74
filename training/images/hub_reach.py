"""Whether the Hub has a dataset, asked once and quickly, before a library tries it for half a minute."""

from collections.abc import Iterator
from contextlib import contextmanager

TIMEOUT_S = 5.0


def hub_trouble(name: str) -> str | None:
    """Return in words why a dataset cannot be had from the Hub; None if it is there, or the answer says nothing.

    Args:
        name: A Hub id, or a word that was meant as the name of a folder.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, the Hub was not asked"
    try:
        HfApi().dataset_info(name, timeout=TIMEOUT_S)
    except RepositoryNotFoundError:
        return "the Hub has no dataset of that name that you may read"
    except HFValidationError:
        return "it is no Hub id either"
    except Exception as error:  # of the network, whose library may change
        # the Hub did answer, whatever it said: let the library deal with it
        if getattr(error, "response", None) is not None:
            return None
        return f"the Hub was not reached ({type(error).__name__})"
    return None


@contextmanager
def without_hub() -> Iterator[None]:
    """Let `datasets` read what it has downloaded before, without a try at the network."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
