"""Pages of the site that lie elsewhere in the repository: a hook of mkdocs.

The README is the home page. A link that leads out of `docs/` to a file of the repository leads to a page with that
file's text. So links work alike on the site and where the repository is browsed.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
LINK = re.compile(r"\]\((?!\w+:|#|/)([^)#\s]+)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".md": "markdown"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are no files of `docs/`."""
    texts = {name: (REPOSITORY / name).read_text(encoding="utf-8") for name in PAGES}
    for file in files.documentation_pages():
        texts[f"docs/{file.src_uri}"] = file.content_string
    named = {target for name, text in texts.items() for target in _targets(name, text)}
    for name in sorted(named - texts.keys()):
        path = REPOSITORY / name
        if not name.startswith("docs/") and path.is_file():
            content = _code_page(name, path) if path.suffix in LANGUAGES else path.read_bytes()
            files.append(_page(config, _place(name), content, InclusionLevel.NOT_IN_NAV))
    for name, place in PAGES.items():
        files.append(_page(config, place, _moved(name, place, texts[name]), InclusionLevel.INCLUDED))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links of a page that lies in `docs/` lead to where the site has them."""
    uri = page.file.src_uri
    return markdown if page.file.generated_by else _moved(f"docs/{uri}", uri, markdown)


def _page(config: Any, place: str, content: str | bytes, inclusion: InclusionLevel) -> File:
    return File.generated(config, place, content=content, inclusion=inclusion)


def _code_page(name: str, path: Path) -> str:
    """Return a page with a file's text, which the search leaves out."""
    fence, text = "`" * 8, path.read_text(encoding="utf-8")
    return f"---\nsearch: {{exclude: true}}\n---\n# {name}\n\n{fence}{LANGUAGES[path.suffix]}\n{text}\n{fence}\n"


def _targets(name: str, text: str) -> set[str]:
    """Return the files of the repository that a file links to."""
    return {posixpath.normpath(posixpath.join(posixpath.dirname(name), link)) for link in LINK.findall(text)}


def _place(name: str) -> str:
    """Return where the site has a file of the repository."""
    if name in PAGES:
        return PAGES[name]
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    return f"code/{name}.md" if posixpath.splitext(name)[1] in LANGUAGES else f"code/{name}"


def _moved(name: str, place: str, text: str) -> str:
    """Return a file's text with its links as they have to be where the site has it."""

    def link(found: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), found[1]))
        return "](" + posixpath.relpath(_place(target), posixpath.dirname(place) or ".")

    return LINK.sub(link, text)
