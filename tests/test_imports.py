"""The direction of imports: modeling knows nothing of training, and importing the package stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
MODELING = sorted((REPOSITORY / "modeling").glob("*.py"))
OPENS_IMAGES = {"rgb_image", "channel_files", "channel_layout", "channel_pixels", "dicom_frames"}
ALLOWED = {"torch", "transformers", "huggingface_hub"} | set(sys.stdlib_module_names)


def imports_of(path):
    """(level, module) of every import, anywhere in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module
            if not node.level and node.module == "hf_vicreg.training":  # `from hf_vicreg.training import tasks`
                yield from ((0, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("path", MODELING, ids=lambda path: path.stem)
def test_modeling_is_flat_and_stands_alone(path):
    # the Hub's custom code: siblings as `from .name import ...`, else only what a user of transformers has anyway
    # what opens images cannot do without Pillow, which transformers' image processors require
    allowed = ALLOWED | ({"PIL", "numpy"} if path.stem in OPENS_IMAGES else set())
    for level, module in imports_of(path):
        if level:
            assert level == 1, f"{path.name}: only siblings"
            assert module is not None, f"{path.name}: `from . import x` is not copied to the Hub"
            assert (path.parent / f"{module}.py").exists(), f"{path.name}: .{module} is not a sibling"
        else:
            assert module.split(".")[0] in allowed, f"{path.name}: {module}"
    assert "hf_vicreg" not in path.read_text(), f"{path.name}: the package's name breaks the copy on the Hub"


SPACE = sorted((REPOSITORY / "hf_vicreg" / "hub_space").glob("*.py"))


@pytest.mark.parametrize("path", SPACE, ids=lambda path: path.stem)
def test_the_app_of_a_space_stands_alone(path):
    for level, module in imports_of(path):
        if level:
            assert level == 1, f"{path.name}: only siblings"
            assert (path.parent / f"{module}.py").exists(), f"{path.name}: .{module} is not a sibling"
        else:
            allowed = {"torch", "transformers", "PIL", "starlette", "uvicorn"} | set(sys.stdlib_module_names)
            assert module.split(".")[0] in allowed, f"{path.name}: {module}"
    assert "hf_vicreg" not in path.read_text(), f"{path.name}: a Space has no such package"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "training").rglob("*.py")), ids=lambda path: path.stem)
def test_training_imports_modeling_and_itself_only(path):
    for level, module in imports_of(path):
        assert level == 0, f"{path.name}: absolute imports"
        if module.split(".")[0] == "hf_vicreg":
            assert module.split(".")[1] in ("modeling", "training", "model_cards"), f"{path.name}: {module}"


# each may import from those before it, and from `errors`; what lies in no room may import from all
ROOMS = (
    "launch",
    "objectives",
    "run",
    "texts",
    "images",
    "monitor",
    "engine",
    "evaluation",
    "pretrained",
    "image_text",
    "tasks",
    "planner",
    "prepare",
)
LARGEST_MODULE, LARGEST_ROOM, LONGEST_ENTRY = 300, 12, 50


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_between_the_rooms_of_training_go_one_way(room):
    below = {"errors", *ROOMS[: ROOMS.index(room) + 1]}
    for path in sorted((REPOSITORY / "training" / room).rglob("*.py")):
        for _, module in imports_of(path):
            if module.startswith("hf_vicreg.training."):
                assert module.split(".")[2] in below, f"{path.relative_to(REPOSITORY)} imports {module}"


def test_every_room_of_training_is_known_and_small():
    training = REPOSITORY / "training"
    assert {path.parent.name for path in training.glob("*/__init__.py")} == set(ROOMS)
    for folder in {path.parent for path in training.rglob("*.py")}:
        found = sorted(path.name for path in folder.glob("*.py"))
        assert len(found) <= LARGEST_ROOM, f"{folder.name}: {found}"
    for path in training.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= LARGEST_MODULE, path


def test_the_entry_reads_like_a_table_of_contents():
    tree = ast.parse((REPOSITORY / "training" / "pretrain.py").read_text())
    (entry,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run_settings")
    assert entry.end_lineno - entry.lineno < LONGEST_ENTRY


def test_model_cards_import_nothing_of_ours():
    for path in (REPOSITORY / "model_cards").glob("*.py"):
        for level, module in imports_of(path):
            assert not level, f"{path.name}: absolute imports"
            allowed = {"yaml", "huggingface_hub"} | set(sys.stdlib_module_names)
            assert module.split(".")[0] in allowed or module.startswith("hf_vicreg.model_cards."), module


def test_importing_the_package_loads_no_training():
    code = (
        "import sys, hf_vicreg\n"
        "loaded = [name for name in ('datasets', 'hf_vicreg.training') if name in sys.modules]\n"
        "sys.exit(f'loaded: {loaded}' if loaded else 0)"
    )
    command = [sys.executable, "-c", code]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=REPOSITORY)
    assert finished.returncode == 0, finished.stderr


def test_public_names():
    import hf_vicreg

    for name in hf_vicreg.__all__:
        assert getattr(hf_vicreg, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hf_vicreg.nothing  # noqa: B018
