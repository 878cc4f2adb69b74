"""A published run and a fine-tuned folder, loaded from the Hub by people with and without the package."""

import json
import sys
import sysconfig
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from safetensors.torch import load_file

from hf_vicreg import BigBirdViTForImageClassification, BigBirdViTImageProcessor

LOADING = Path(__file__).with_name("worker_loading.py")


@pytest.fixture(scope="module")
def fine_tuned(run_folder, tmp_path_factory):
    """A classifier on the run's encoder, saved with its processor."""
    folder = tmp_path_factory.mktemp("fine_tuned")
    names = ["cat", "dog", "eel"]
    torch.manual_seed(0)
    model = BigBirdViTForImageClassification.from_pretrained(
        run_folder, id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)}
    )
    model.save_pretrained(folder)
    BigBirdViTImageProcessor.from_pretrained(run_folder).save_pretrained(folder)
    return folder


def required(names):
    """Names of distributions and all that they require, without extras."""
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            for line in distribution(name).requires or []:
                requirement = Requirement(line)
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    waiting.append(requirement.name)
    return found


@pytest.fixture(params=["linked", pytest.param("installed", marks=pytest.mark.timeout(1800))])
def bare_python(request, run_process, tmp_path):
    """The interpreter of a fresh virtual environment that has torch, transformers, pillow and what these require.

    Installing them, in the releases of this environment, takes minutes: `make test-package` links to its packages.
    """
    folder = tmp_path / "bare"
    bare = ["torch", "transformers", "pillow"]
    if request.param == "installed":
        made = run_process([sys.executable, "-m", "venv", folder])
        assert made.returncode == 0, made.stderr
        releases = [f"{name}=={Version(version(name)).public}" for name in bare]
        installed = run_process([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *releases], 900)
        assert installed.returncode == 0, installed.stderr
        return folder / "bin" / "python"
    made = run_process([sys.executable, "-m", "venv", "--without-pip", folder])
    assert made.returncode == 0, made.stderr
    site = Path(sysconfig.get_path("purelib"))
    (target,) = folder.glob("lib/python*/site-packages")
    for name in required(bare):
        for top in {file.parts[0] for file in distribution(name).files or []}:
            if (site / top).exists() and top not in ("..", "__pycache__") and not (target / top).exists():
                (target / top).symlink_to(site / top)
    return folder / "bin" / "python"


@pytest.mark.slow
def test_a_stranger_and_a_friend_get_the_owners_features(
    hub, publishing, run_process, environment, run_folder, fine_tuned, bare_python, tmp_path
):
    published = ["publish", str(run_folder), "--repo", "writer/encoder", "--include_pretraining"]
    encoder, classifier = publishing([{"cli": published}, {"push": str(fine_tuned), "repo": "lab/classifier"}])
    assert encoder["code"] == 0, encoder["err"]
    assert "error" not in classifier
    repository = hub.repositories["writer/encoder"]
    assert len(repository.commits) == 2  # the Hub's own first one, and one of ours

    folders = {"encoder": str(run_folder), "classifier": str(fine_tuned)}
    ids = {"encoder": "writer/encoder", "classifier": "lab/classifier"}
    places = {"owner": folders, "friend": ids, "stranger": ids}
    outs = {role: tmp_path / f"{role}.safetensors" for role in places}
    for command, roles in (([sys.executable], ["owner", "friend"]), ([bare_python, "-I"], ["stranger"])):
        request = tmp_path / f"{roles[0]}.json"
        request.write_text(json.dumps([{"role": role, "out": str(outs[role])} | places[role] for role in roles]))
        own = environment | {"HF_HOME": str(tmp_path / f"home of {roles[0]}"), "HF_TOKEN": ""}
        finished = run_process([*command, LOADING, request], **own)
        assert finished.returncode == 0, finished.stderr
    found = {role: load_file(out) for role, out in outs.items()}
    assert found["owner"]["pipeline"].shape == (1, 17, 32)
    for role in ("friend", "stranger"):
        assert found[role].keys() == found["owner"].keys()
        for name, tensor in found["owner"].items():
            assert torch.equal(found[role][name], tensor), f"{role}: {name}"
