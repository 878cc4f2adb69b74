"""The last look at text that is about to leave the machine."""

import os
import re
import struct
from pathlib import Path

from huggingface_hub import get_token

PATTERNS = {
    "a Hub token": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "a GitHub token": re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})"),
    "an AWS key": re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{16}\b"),
    "an API key": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a home folder": re.compile(r"(/home/|/Users/|\b[A-Za-z]:\\+Users\\+)[^\s/\\\"']+"),
}
SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY|CREDENTIAL", re.IGNORECASE)
SHORTEST = 8  # characters of an environment variable's value that is looked for


def refuse_secrets(folder: Path, names: list[str]) -> None:
    """Raise ValueError if a staged file holds what looks like a token, a key or a path into someone's home.

    The values of environment variables that are named like secrets, and the Hub token in use, are looked for as they
    are. The message names file and line, never what was found.

    Args:
        folder: The staged folder.
        names: Files in it; of weights, the header is looked at.
    """
    known = {value for name, value in os.environ.items() if SECRET_NAMES.search(name) and len(value) >= SHORTEST}
    known |= {token for token in (get_token(),) if token}
    home = str(Path.home())
    for name in names:
        path = folder / name
        if path.suffix == ".png":
            continue  # drawn or encoded again by us, without comments
        text = _header(path) if path.suffix == ".safetensors" else path.read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), start=1):
            found = next((what for what, pattern in PATTERNS.items() if pattern.search(line)), None)
            if any(value in line for value in known):
                found = "the value of a secret environment variable"
            if home != "/" and f"{home}/" in line:
                found = "a home folder"
            if found:
                raise ValueError(f"`{name}`: expected nothing secret, line {number} holds {found}; take it out.")


def _header(path: Path) -> str:
    """Return the JSON at the front of a safetensors file: names, shapes and metadata."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return file.read(length).decode("utf-8")
