"""The README and the guides are run as written: Python blocks are executed, commands are parsed."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import tifffile
import torch
from PIL import Image

import hf_vicreg
from hf_vicreg import pretrain
from hf_vicreg.cli import build_parser
from hf_vicreg.training.run.flags import parse_flags
from hf_vicreg.training.run.resolve import resolve
from hf_vicreg.training.run.settings import recipe_names

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs" / "guides").glob("*.md"))]
BLOCK = re.compile(r"^(<!-- not run by the tests: .*? -->\n)?```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    return [code for skipped, kind, code in BLOCK.findall(page.read_text()) if kind == language and not skipped]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, request):
    """A folder where `my_images` are and `runs/mine` is a finished run."""
    conftest = request.config.pluginmanager.get_plugin(str(REPOSITORY / "tests" / "conftest.py"))
    folder = tmp_path_factory.mktemp("docs")
    (folder / "my_images").mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(64):
        pixels = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(pixels).save(folder / "my_images" / f"{index}.png")
    (folder / "my_cells").mkdir()
    for index in range(8):
        pixels = torch.randint(0, 4096, (2, 40, 48), generator=generator).numpy().astype("uint16")
        tifffile.imwrite(folder / "my_cells" / f"{index}.tif", pixels, photometric="minisblack")
    threads = torch.get_num_threads()
    pretrain(out=folder / "runs" / "mine", data=folder / "my_images", **conftest.TINY_RECIPE)
    torch.set_num_threads(threads)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_run(page, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    names = {"images": [Image.new("RGB", (40, 40), (200, 10, 30)) for _ in range(2)]}
    found = blocks(page, "python")
    assert found
    for text in blocks(page, "yaml"):
        named = re.match(r"# (\w+\.yaml)\n", text)  # a file that the blocks read
        if named:
            (workplace / named[1]).write_text(text)
    for code in found:
        exec(compile(code, page.name, "exec"), names)
    assert names["model"] is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_have_known_flags(page, workplace, monkeypatch):
    monkeypatch.chdir(workplace)  # where `my_images` are
    text = "\n".join(blocks(page, "bash"))
    starts = re.compile(r"hf_vicreg\.training\.pretrain|hf-vicreg pretrain")
    commands = [line for line in text.replace("\\\n", " ").splitlines() if starts.search(line)]
    assert commands
    for command in commands:
        arguments = shlex.split(starts.split(command, maxsplit=1)[1], comments=True)
        if "--help" not in arguments:
            given = parse_flags(arguments)
            given.pop("num_processes", None)  # of the command, not of a run
            resolve({"output_dir": "runs/new"} | given)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_verbs_and_flags_of_the_command_are_known(page, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    for line in text.splitlines():
        if line.startswith("hf-vicreg pretrain "):
            given = parse_flags(shlex.split(line)[2:])
            given.pop("num_processes", None)
            resolve({"output_dir": "somewhere"} | given)
        elif line.startswith("hf-vicreg "):
            build_parser().parse_args(shlex.split(line)[1:])  # exits with 2 if not


def test_every_recipe_is_named_in_the_guide():
    guide = (REPOSITORY / "docs" / "guides" / "pretraining.md").read_text()
    assert all(f"`{name}`" in guide for name in recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_commands_in_recipes_have_known_flags(name):
    text = (REPOSITORY / "training" / "recipes" / f"{name}.yaml").read_text()
    (command,) = (line for line in text.splitlines() if "hf_vicreg.training.pretrain" in line)
    arguments = shlex.split(command.split("hf_vicreg.training.pretrain", 1)[1])
    resolve(parse_flags(arguments))


def test_the_api_page_has_every_public_name():
    described = re.findall(r"^::: (\S+)$", (REPOSITORY / "docs" / "api.md").read_text(), re.MULTILINE)
    homes = [one.rpartition(".") for one in described]
    objects = [getattr(importlib.import_module(module), name) for module, _, name in homes]
    for name in set(hf_vicreg.__all__) - {"__version__"}:
        assert getattr(hf_vicreg, name) in objects, name


LINKING = [*PAGES, *(REPOSITORY / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md"))]


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.stem)
def test_relative_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).is_file(), target


ARCHITECTURE = (REPOSITORY / "docs" / "architecture.md").read_text()
PLACE = re.compile(r"\[`([^`]+)`\]\(([^)]+)\)")  # [`dir/file.py`](../dir/file.py)


def test_every_path_of_the_architecture_exists():
    named = [code for code in re.findall(r"`([^`\n]+)`", ARCHITECTURE) if "/" in code]
    assert len(named) > 50
    for path in named:
        assert (REPOSITORY / path).exists(), path
        assert not path.endswith("/") or (REPOSITORY / path).is_dir(), path


def test_every_link_of_the_architecture_leads_to_the_path_it_names():
    for path, target in PLACE.findall(ARCHITECTURE):
        assert target == f"../{path}"


def test_every_name_beside_a_path_of_the_architecture_is_defined_there():
    rows = re.findall(r"^\| [^|]+ \| ([^|]*\]\([^|]*) \| [^|]+ \|$", ARCHITECTURE, re.MULTILINE)
    assert len(rows) > 30
    for row in rows:
        _, *places = re.split(r"\[`", row)
        for place in places:
            path, *names = re.findall(r"([\w./]+)`", place)
            assert names or not path.endswith(".py"), path
            source = (REPOSITORY / path).read_text()
            for name in names:
                *owner, last = name.split(".")
                for defined in (*owner, last):
                    assert re.search(rf"^\s*(def|class) {defined}\b|^{defined}\b", source, re.MULTILINE), (path, name)


def test_the_architecture_names_every_module_and_every_room():
    named = set(re.findall(r"`([^`\n]+)`", ARCHITECTURE))
    package = REPOSITORY / "hf_vicreg"
    folders = [path.parent for path in package.glob("*/__init__.py") if not path.parent.is_symlink()]
    folders += [package, *(REPOSITORY / room for room in ("modeling", "model_cards", "training"))]
    modules = [path for folder in folders for path in folder.glob("*.py")]
    own = {str(path.relative_to(REPOSITORY)) for path in modules if path.name != "__init__.py"}
    rooms = {f"training/{path.parent.name}/" for path in (REPOSITORY / "training").glob("*/__init__.py")}
    assert own | rooms <= named, sorted((own | rooms) - named)
