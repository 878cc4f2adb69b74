"""The tables in the README have every reason to skip, and no other; runs without the mixins."""

from pathlib import Path

from own_skips import ALL, UPSTREAM

README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")


def rows(beginning):
    return [line.strip("| ").split(" | ") for line in README.splitlines() if line.startswith(beginning)]


def test_readme_has_our_skips():
    assert rows("| `test_") == [
        [f"`{name}`", where, reason] for where, skips in ALL.items() for name, reason in skips.items()
    ]


def test_readme_has_upstreams_skips():
    assert rows('| "') == [[f'"{said}"', why] for said, why in UPSTREAM.items()]
