"""The checks before publishing find torch where the user has it: in a user's site, or on PYTHONPATH."""

import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from hf_vicreg.publishing.checks import import_path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_own_places_are_kept_and_the_present_folder_and_the_checkout_are_not(tmp_path, monkeypatch):
    here, site, foreign = (tmp_path / name for name in ("here", "site", "foreign"))
    for folder in (here, site, foreign / "lib"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    kept = [str(site), sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")]
    others = ["", ".", "relative", str(here), str(REPOSITORY), str(foreign), str(foreign / "lib")]
    monkeypatch.setattr(sys, "path", [*others[:3], kept[0], *others[3:], *kept[1:]])
    assert import_path(foreign) == kept


@pytest.mark.slow
@pytest.mark.parametrize("where", ["PYTHONPATH", "a user's site"])
def test_a_dry_run_works_where_torch_is_no_part_of_the_interpreter(where, run_process, run_folder, tmp_path):
    """An interpreter without a single package, to which the user's own places add all of them."""
    bare = tmp_path / "bare"
    base = getattr(sys, "_base_executable", sys.executable)
    made = run_process([base, "-m", "venv", "--without-pip", "--system-site-packages", bare])
    assert made.returncode == 0, made.stderr
    python, purelib = bare / "bin" / "python", sysconfig.get_path("purelib")
    environment = {"PYTHONNOUSERSITE": ""}
    if where == "PYTHONPATH":
        environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), purelib])
    else:
        release = f"python{sys.version_info.major}.{sys.version_info.minor}"
        site = tmp_path / "user" / "lib" / release / "site-packages"
        site.mkdir(parents=True)
        (site / "packages.pth").write_text(f"{purelib}\n{REPOSITORY}\n")
        environment |= {"PYTHONUSERBASE": str(tmp_path / "user"), "PYTHONPATH": ""}
    hidden = run_process([python, "-I", "-c", "import torch"], **environment)
    if hidden.returncode == 0:
        pytest.skip("the interpreter below this environment has torch itself")
    run = shutil.copytree(run_folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "pretraining"))
    (tmp_path / "torch.py").write_text("open('PLANTED', 'w')\n")  # in the present folder: never imported by the checks
    command = "import sys; sys.path.remove(''); from hf_vicreg.cli import main; sys.exit(main(sys.argv[1:]))"
    published = [python, "-c", command, "publish", run, "--repo", "lab/demo", "--dry_run"]
    finished = run_process(published, 400, **environment)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.rstrip().endswith("nothing was sent")
    assert not list(tmp_path.glob("PLANTED"))
    assert json.loads((run / "results.json").read_text())["features"] == 32
