"""The last look at files that are about to leave the machine."""

import json
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import get_token

from hf_vicreg.model_cards.escaping import one_line
from hf_vicreg.publishing.secret_patterns import secret_in, secret_under
from hf_vicreg.training.errors import InputError

SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY|CREDENTIAL", re.IGNORECASE)
SHORTEST = 8  # characters of an environment variable's value that is looked for
PICTURE_CHUNKS = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"pHYs", b"tRNS"}  # pixels, and their size


def refuse_secrets(folder: Path, names: list[str]) -> None:
    """Raise InputError if a staged file holds what looks like a token, a key or a path into someone's home.

    The values of environment variables that are named like secrets, and the Hub token in use, are looked for as they
    are. The message names file, kind and field or line, never what was found.

    Args:
        folder: The staged folder.
        names: Files in it; of weights, the header is looked at.
    """
    known = {value for name, value in os.environ.items() if SECRET_NAMES.search(name) and len(value) >= SHORTEST}
    known |= {token for token in (get_token(),) if token}
    home = str(Path.home())

    def kind_of(text: str, *, assignments: bool) -> str | None:
        if any(value in text for value in known):
            return "the value of a secret environment variable"
        if home != "/" and f"{home}/" in text:
            return "a home folder"
        return secret_in(text, assignments=assignments)

    for name in names:
        path = folder / name
        if path.suffix == ".png":
            if foreign := sorted(_chunks(path) - PICTURE_CHUNKS):
                raise InputError(
                    f"`{name}`: expected pixels alone, it holds {foreign[0]!r}; save it without comments."
                )
            continue
        for where, field, text in _texts(path):
            # in our code variables are called `token`
            found = kind_of(text, assignments=path.suffix != ".py") or (secret_under(field, text) if field else None)
            if found:
                raise InputError(f"`{name}`: expected nothing secret, {where} holds {found}; take it out.")


def _texts(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the texts of a file: where each is, the name of its field, if it has one, and what it says."""
    if path.suffix == ".safetensors":
        yield from _fields(json.loads(_header(path)), "")
        return
    content = path.read_text(encoding="utf-8")
    if path.suffix in (".json", ".yaml"):
        yield from _fields(yaml.safe_load(content) if path.suffix == ".yaml" else json.loads(content), "")
    else:
        yield from ((f"line {number}", "", line) for number, line in enumerate(content.splitlines(), start=1))


def _fields(value: Any, field: str) -> Iterator[tuple[str, str, str]]:
    if isinstance(value, dict):
        for key, one in value.items():
            # a name may be a secret itself: it is shown where it is none
            yield f"the name of a field in `{field}`" if field else "the name of a field", "", str(key)
            yield from _fields(one, f"{field}.{one_line(key)}" if field else one_line(key))
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from _fields(one, f"{field}[{index}]")
    elif isinstance(value, str):
        yield f"`{field}`", re.sub(r"\[\d+\]$", "", field).rpartition(".")[2], value


def _header(path: Path) -> str:
    """Return the JSON at the front of a safetensors file: names, shapes and metadata."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return file.read(length).decode("utf-8")


def _chunks(path: Path) -> set[bytes]:
    """Return the kinds of chunks that a PNG file is made of."""
    content, found, at = path.read_bytes(), set(), 8
    while at + 8 <= len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        found.add(content[at + 4 : at + 8])
        at += length + 12
    return found
