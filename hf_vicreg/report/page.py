"""The page: one HTML file with its styles, scripts, figures and images inside, that can load nothing from elsewhere.

Text of others is escaped where it is written: `shown` in HTML, `data_block` in the data that the scripts read. The
scripts put text into the page as text alone. The page's own policy lets no script and no style run but these.
"""

import base64
import hashlib
import html
import json
from importlib import resources
from typing import Any

from hf_vicreg.model_cards.escaping import one_line

STYLE, SCRIPTS = "page.css", ("page.js", "curves.js", "attention.js", "map.js")
ICON = (
    "data:image/svg+xml,"
    "%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 8 8'%3E%3Crect width='8' height='8' rx='2' "
    "fill='%231b9e77'/%3E%3C/svg%3E"
)


def shown(text: object) -> str:
    """Return text that HTML shows as it is, in an element or in an attribute in double quotes."""
    return html.escape(one_line(text), quote=True)


def command(words: str) -> str:
    """Return the line below a figure: the command that makes it."""
    return f'<p class="made">made by <code>{shown(words)}</code></p>'


def note(text: str) -> str:
    """Return a line in place of a figure: why there is none."""
    return f'<p class="none">{shown(text)}</p>'


def section(name: str, title: str, lead: str, body: str, made_by: str = "") -> str:
    """Return a section; `body` is HTML, the rest is text."""
    return (
        f'<section id="{shown(name)}"><h2>{shown(title)}</h2><p class="lead">{shown(lead)}</p>{body}'
        f"{command(made_by) if made_by else ''}</section>"
    )


def side_by_side(names: list[str], bodies: list[str]) -> str:
    """Return what several runs have to show beside each other, under their names; of one run, that alone."""
    if len(bodies) == 1:
        return bodies[0]
    titled = (
        f'<div class="run run{at}"><h3>{shown(name)}</h3>{body}</div>'
        for at, (name, body) in enumerate(zip(names, bodies, strict=True))
    )
    return f'<div class="runs">{"".join(titled)}</div>'


def picture(uri: str, text: object, kind: str = "") -> str:
    """Return an image with what it is called."""
    return f'<img src="{uri}" alt="{shown(text)}" title="{shown(text)}" class="{kind}" loading="lazy">'


def data_block(name: str, data: Any) -> str:
    """Return data for the scripts, which no text in it can end or begin anything in.

    Raises:
        ValueError: A number that is not finite.
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    for one in "<>&":
        text = text.replace(one, f"\\u{ord(one):04x}")
    return f'<script type="application/json" id="{shown(name)}">{text}</script>'


def page(title: str, body: str, data: Any) -> str:
    """Return the whole file.

    Args:
        title: Of the page, text.
        body: HTML.
        data: What the scripts read: plain values with finite numbers.
    """
    style, script = _file(STYLE), "\n".join(_file(name) for name in SCRIPTS)
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta name="generator" content="hf-vicreg report">\n<link rel="icon" href="{ICON}">\n'
        f"<title>{shown(title)}</title>\n<style>{style}</style></head>\n<body>{body}\n"
        f"{data_block('data', data)}\n<script>{script}</script>\n</body></html>\n"
    )


def _file(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
