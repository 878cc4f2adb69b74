"""Does a folder give others what the run gives here? Asked in processes that have nothing of this one.

The folder may be somebody else's. Code that runs is ours: this package's, and the copies of it in the staged folder.
What a file says is handed over as data.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import load_file

from hf_vicreg.model_cards.card import executable_snippet
from hf_vicreg.model_cards.escaping import one_line
from hf_vicreg.publishing.secret_scan import SECRET_NAMES
from hf_vicreg.publishing.staging import PRETRAINING, SECOND, Staged
from hf_vicreg.training.errors import InputError

TIMEOUT_S = 900


def check_loads(staged: Staged, run: Path) -> dict[str, torch.Tensor]:
    """Load a staged folder with the package and without it, run the card's code, and compare with the run.

    Args:
        staged: The folder to be published.
        run: Where it came from, loaded with the package: its features are what all others have to equal, bit for bit.

    Returns:
        The run's features of two fixed images, by name.

    Raises:
        InputError: The folder does not load, or its features are others.
    """
    reference, here = _features([run, staged.folder], staged, package=True)
    _refuse_difference(reference, here, "loaded with the package")
    check_loads_without_package(staged, staged.folder, reference)
    return reference


def check_loads_without_package(staged: Staged, folder: Path, reference: dict[str, torch.Tensor]) -> None:
    """Load a folder where `hf_vicreg` cannot be imported, run the card's code, and compare with `reference`.

    Raises:
        InputError: It does not load, or its features are others.
    """
    (found,) = _features([folder], staged, package=False)
    _refuse_difference(reference, found, "loaded without the package")


def _features(folders: list[Path], staged: Staged, *, package: bool) -> list[dict[str, torch.Tensor]]:
    facts = staged.facts
    with tempfile.TemporaryDirectory() as scratch:
        outs = [Path(scratch) / f"{index}.safetensors" for index in range(len(folders))]
        request = {
            "package": str(_package_root()) if package else None,
            "path": import_path(staged.folder, *folders),
            "folders": {str(folder.resolve()): str(out) for folder, out in zip(folders, outs, strict=True)},
            "subfolders": [SECOND] * facts.has_second_encoder + [PRETRAINING] * facts.has_pretraining,
            # the run itself is loaded as its own card says; what is published, as the one on the Hub will
            "snippet": "" if package else executable_snippet(is_classifier=facts.is_classifier, is_dual=facts.is_dual),
        }
        path = Path(scratch) / "request.json"
        path.write_text(json.dumps(request))
        program = resources.files("hf_vicreg.publishing") / "features_program.py"
        try:
            finished = subprocess.run(
                [sys.executable, "-I", str(program), str(path)],
                env=clean_environment(scratch),
                stdin=subprocess.DEVNULL,  # nobody is there to trust code when asked
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                cwd=scratch,
            )
        except subprocess.TimeoutExpired:
            raise InputError(f"`RUN`: expected the model to load within {TIMEOUT_S} s, it did not.") from None
        if finished.returncode:
            how = "with" if package else "without"
            reason = (finished.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise InputError(f"`RUN`: expected a model that loads {how} the package, got: {one_line(reason)[:500]}")
        return [load_file(out) for out in outs]


def import_path(*foreign: Path) -> list[str]:
    """Return where this process finds its modules, for a process that `-I` hides the user's own places from.

    torch may be installed for the user alone, or lie on `PYTHONPATH`, as on clusters. The present folder, the checkout
    of this package and whatever lies in the folders of others are left out.
    """
    here, root = Path.cwd().resolve(), _package_root()
    found = []
    for entry in sys.path:
        path = Path(entry).resolve()
        is_checkout = path == root and (root / "pyproject.toml").exists()
        inside = any(path.is_relative_to(folder.resolve()) for folder in foreign)
        if entry and Path(entry).is_absolute() and path != here and not is_checkout and not inside:
            found.append(entry)
    return found


def _package_root() -> Path:
    return Path(str(resources.files("hf_vicreg"))).parent.resolve()


def clean_environment(scratch: str) -> dict[str, str]:
    """The environment of a stranger on this machine: no network, no cache, no secrets, no GPU."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not SECRET_NAMES.search(name) and not re.match(r"HF_|TRANSFORMERS_|PYTHON", name)
    }
    return environment | {
        "HF_HOME": f"{scratch}/home",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",  # sums in one order, whoever computes them
    }


def _refuse_difference(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], how: str) -> None:
    for name, tensor in expected.items():
        if name not in found or not torch.equal(found[name], tensor):
            difference = "none" if name not in found else f"{(found[name] - tensor).abs().max():.1e} off"
            raise InputError(f"`RUN`: expected {name} equal to the run's when {how}, got {difference}.")
