"""The notebooks run from the first cell to the last, with fewer steps."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "docs" / "notebooks").glob("*.ipynb"))
STEPS, FEW = "steps = 250\n", "steps = 4\n"


def cells(notebook):
    return [
        "".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_to_its_end(notebook, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    found = cells(notebook)
    assert sum(STEPS in one for one in found) == 1
    names = {}
    for number, code in enumerate(found):
        exec(compile(code.replace(STEPS, FEW), f"{notebook.stem}[{number}]", "exec"), names)
        plt.close("all")
    assert names["accuracies"].keys() == {"raw_pixels", "untrained", "trained"}
    assert len(names["embeddings"]) == 360
    figure = names["hf_vicreg"].show_views(names["some"][0], names["views"], image_size=32)
    assert isinstance(figure, Figure)
    assert figure._repr_png_().startswith(b"\x89PNG"), "what a notebook shows"
    assert (tmp_path / "runs" / "first_evening" / "model.safetensors").is_file()
    assert not capsys.readouterr().err.count("Traceback")


def test_a_notebook_is_stored_with_what_it_showed():
    for notebook in NOTEBOOKS:
        shown = [cell["outputs"] for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
        assert sum(bool(outputs) for outputs in shown) >= 6
        assert sum(STEPS in code for code in cells(notebook)) == 1
        for code in cells(notebook):
            compile(code, notebook.name, "exec")
