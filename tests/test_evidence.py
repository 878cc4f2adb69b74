"""What is quoted, what it comes from and what repeats it: README's tables, committed results, the script."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from benchmarks.readme_tables import PAGES, PLACE, TABLES, with_tables
from hf_vicreg.cli import build_parser
from hf_vicreg.training.run.flags import parse_flags
from hf_vicreg.training.run.settings import explicit_settings

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "benchmarks" / "evidence.sh"
PAGE = (REPOSITORY / "docs" / "reproducing.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \|.*\| `([\w/.`, ]+)` \| *(\w*) *\|$", PAGE, re.MULTILINE)
NAMES = re.findall(r"^(\w+)\)", SCRIPT.read_text(), re.MULTILINE)


def test_tables_are_those_of_the_results():
    texts = [page.read_text() for page in PAGES]
    assert [found[2] for text in texts for found in PLACE.finditer(text)] == list(TABLES)
    for text in texts:
        assert with_tables(text) == text
        assert with_tables(PLACE.sub(lambda found: found[1] + "by hand" + found[4], text)) == text


def test_the_page_names_what_can_be_repeated_and_every_result():
    assert sorted(name for name, _, _ in ROWS) == sorted(NAMES)
    named = {REPOSITORY / path for _, paths, _ in ROWS for path in paths.split("`, `")}
    assert all(path.exists() for path in named)
    results = {path for path in (REPOSITORY / "benchmarks" / "results").iterdir() if path.suffix in ("", ".json")}
    results |= {path.parent for path in (REPOSITORY / "model_cards").glob("*/results.json")}
    assert results - named <= {REPOSITORY / "benchmarks" / "results" / "cifar10_cpu_search.json"}


@pytest.mark.parametrize(
    ("name", "message"),
    [("digit", "error: `NAME`: expected one of digits cifar10_cpu "), ("ablations", "error: `CIFAR10`: expected ")],
)
def test_what_is_missing_is_told_in_a_line(name, message):
    environment = {key: value for key, value in os.environ.items() if key != "CIFAR10"}
    found = subprocess.run([SCRIPT, name], capture_output=True, text=True, timeout=60, env=environment)
    assert found.returncode == 2
    (line,) = found.stderr.splitlines()
    assert line.startswith(message)


@pytest.mark.parametrize("name", [one for one in NAMES if one != "planned_memory"])
def test_every_command_has_known_flags(name, tmp_path):
    """With a stand-in for Python that writes its arguments down, which each program's own parser reads."""
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" RUN "$@"\n')
    stand_in.chmod(0o755)
    images = {one: str(tmp_path) for one in ("CIFAR10", "BCCD", "NUCLEI", "EMOJI")}
    environment = os.environ | images | {"PYTHON": str(stand_in), "OUT": str(tmp_path / "out")}
    found = subprocess.run([SCRIPT, name], capture_output=True, text=True, timeout=60, env=environment, check=True)
    programs = [one.splitlines() for one in found.stdout.split("RUN\n")[1:]]
    assert programs
    for dash, module, *flags in programs:
        assert dash == "-m"
        if flags[0] == "pretrain":
            given = parse_flags(flags[1:])
            given["data"] = str(tmp_path)  # some are made on the way
            folder = Path(explicit_settings(given)["output_dir"])
            assert tmp_path / "out" / name in (folder, folder.parent)
        elif module == "hf_vicreg.cli":
            build_parser().parse_args(flags)
        else:
            text = (REPOSITORY / f"{module.replace('.', '/')}.py").read_text()
            assert all(f'"{flag}"' in text for flag in flags if flag.startswith("--"))


def test_objectives_are_compared_on_one_recipe():
    recipe = yaml.safe_load((REPOSITORY / "benchmarks" / "objectives.yaml").read_text())
    assert recipe["learning_rate"] == 1e-3
    assert not {"vicreg", "simclr"} & recipe.keys()  # nothing is set for one of them alone
