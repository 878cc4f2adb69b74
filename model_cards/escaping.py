"""Text of others on its way out: to a screen, into Markdown, into Python code. Each place has its own escape.

What is escaped here may hold anything. Its type and length are checked where it is read, in `schema.py`.
"""

import json
import logging
import re
from pathlib import PurePath
from typing import Any

# they move a cursor, change colours, break a line or turn the order of letters around
STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
MARKDOWN = re.compile(r"[\\`*\[\]|~$]")
HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def printable(text: object) -> str:
    """Return text with what steers a terminal written out, as `\\x1b`; newline and tab stay."""
    return STEERING.sub(lambda found: _written_out(ord(found[0])), str(text))


def one_line(text: object) -> str:
    """Return printable text on one line, blanks as single spaces."""
    return " ".join(printable(text).split())


def prose(text: object) -> str:
    """Return text that Markdown shows as it is, in a line, a heading or the cell of a table."""
    escaped = MARKDOWN.sub(lambda found: "\\" + found[0], "".join(HTML.get(one, one) for one in one_line(text)))
    return escaped.replace("://", ":&#47;/")  # or it would become a link


def code(text: object) -> str:
    """Return text as a span of code, in a line or the cell of a table."""
    line = one_line(text).replace("|", "\\|") or " "
    fence = "`" * _longest_run(line, start=1)
    pad = " " if line[0] == "`" or line[-1] == "`" else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def code_block(text: str, language: str) -> str:
    """Return lines of text as a block of code that nothing in it can end."""
    fence = "`" * _longest_run(text, start=3)
    return f"{fence}{language}\n{printable(text)}\n{fence}"


def python_string(text: object) -> str:
    """Return text as a string of Python's, in double quotes."""
    return json.dumps(one_line(text), ensure_ascii=False)


def without_paths(value: Any) -> Any:
    """Return plain values with the last part of a path in place of the path: where it led is a machine's business."""
    if isinstance(value, dict):
        return {key: without_paths(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_paths(one) for one in value]
    return PurePath(value).name if is_path(value) else value


def is_path(value: Any) -> bool:
    """Return whether a value is text that says where something lies on a machine."""
    return isinstance(value, str) and (PurePath(value).is_absolute() or value.startswith(("./", "../", "~")))


class PrintableFormatter(logging.Formatter):
    """Formats log records for a screen: names of files and what servers say are text of others, too."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's text, printable."""
        return printable(super().format(record))


def _longest_run(text: str, *, start: int) -> int:
    """Return the length of a fence of backticks that is longer than every run of them in a text."""
    return max(start, *(1 + len(run) for run in ["", *re.findall("`+", text)]))


def _written_out(number: int) -> str:
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
