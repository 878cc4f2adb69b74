"""Flags of `hf-vicreg embed`; light, for the command's parser reads them all."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from hf_vicreg.training.errors import InputError, hint
from hf_vicreg.training.evaluation.arguments import flag

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("float32", "float16")


@dataclass
class EmbedArguments:
    """How images are embedded."""

    split: str | None = flag(
        None,
        "Split of a data set; default: `train`. A folder of images is then read as a data set, with a sub-folder for "
        "each class, as `evaluate` reads it.",
    )
    dataset_config_name: str | None = flag(None, "Configuration of the Hub dataset.")
    image_column_name: str | None = flag(None, "Column of images; default: the only one.")
    label_column_name: str | None = flag(None, "Column of labels; default: `label` if there is one.")
    dtype: Literal["float32", "float16"] = flag("float32", "Of the stored embeddings; they are computed in float32.")
    patch_tokens: bool = flag(False, "Store the token of each patch as well, in float16.")
    inner_layers: bool = flag(
        False, "Store the mean tokens of two inner layers as well: `hf-vicreg explore` finds odd images by them."
    )
    batch_size: int = flag(64, "Images encoded at once.")
    num_workers: int | None = flag(
        None,
        "Loader processes of each process: on a CPU they encode as well, one thread each; default: as many as there "
        "are cores. 0: none.",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = flag(
        "auto", "`auto` (a GPU if there is one), `cpu`, `cuda`, `mps`."
    )


def embed_arguments(flags: dict[str, Any]) -> EmbedArguments:
    """Return flags as their dataclass, checked.

    Raises:
        InputError: An unknown flag, or a value out of range.
    """
    known = [one.name for one in dataclasses.fields(EmbedArguments)]
    for name in flags:
        if name not in known:
            raise InputError(f"`{name}`: unknown flag{hint(name, known)} Expected some of {', '.join(known)}.")
    arguments = EmbedArguments(**flags)
    for name, least in (("batch_size", 1), ("num_workers", 0)):
        value = getattr(arguments, name)
        if value is not None and (not isinstance(value, int) or value < least):
            raise InputError(f"`{name}`: expected an integer of at least {least}, got {value!r}.")
    for name, choices in (("dtype", DTYPES), ("device", DEVICES)):
        if getattr(arguments, name) not in choices:
            raise InputError(f"`{name}`: expected one of {', '.join(choices)}, got {getattr(arguments, name)!r}.")
    return arguments
