"""What 0.1.0 wrote: a run folder and a published one that load, and a checkpoint that goes on.

They are of that version's own code, and the published folder holds it. The run trained on 36 images of 36x36 pixels,
which follow from their index (`write_images`).
"""

import hashlib
import shutil
import sys
import tarfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining

from hf_vicreg import pretrain
from hf_vicreg.training.monitor.run_log import read_log

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
RUN = FIXTURES / "run_0.1.0"
SIDE, COUNT = 36, 36
# what that version's model gave of `torch.linspace(-1, 1, 3 * 40 * 24).view(1, 3, 40, 24)`
FEATURES = [0.73705977, 0.49622065, 0.36243039, 0.14046456, -1.11126173, 0.07226317]


def write_images(folder):
    folder.mkdir()
    for index in range(COUNT):
        pixels = hashlib.shake_128(str(index).encode()).digest(SIDE * SIDE * 3)
        (folder / f"{index:04d}.ppm").write_bytes(b"P6 %d %d 255\n" % (SIDE, SIDE) + pixels)


def test_a_run_of_before_loads():
    model = AutoModel.from_pretrained(RUN).eval()
    image = torch.linspace(-1, 1, 3 * 40 * 24).view(1, 3, 40, 24)
    torch.testing.assert_close(model(image).pooler_output[0, :6], torch.tensor(FEATURES), rtol=1e-4, atol=1e-5)
    assert AutoImageProcessor.from_pretrained(RUN).size["height"] == 32
    wrapper = AutoModelForPreTraining.from_pretrained(RUN, subfolder="pretraining")
    own, inner = model.state_dict(), wrapper.encoder.state_dict()
    assert all(torch.equal(own[name], inner[name]) for name in own)


def test_a_published_folder_of_before_loads_with_the_package_and_without(tmp_path, run_process):
    with tarfile.open(FIXTURES / "published_0.1.0.tar.gz") as archive:
        archive.extractall(tmp_path / "published", filter="data")
    assert (tmp_path / "published" / "table_store.py").exists()  # code that this version has no more
    image = torch.linspace(-1, 1, 3 * 40 * 24).view(1, 3, 40, 24)
    model = AutoModel.from_pretrained(tmp_path / "published").eval()
    assert type(model).__module__.startswith("hf_vicreg.")
    torch.testing.assert_close(model(image).pooler_output[0, :6], torch.tensor(FEATURES), rtol=1e-4, atol=1e-5)
    script = tmp_path / "stranger.py"
    script.write_text(
        "import sys\n"
        "sys.modules['hf_vicreg'] = None\n"
        "import torch\n"
        "from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained('published', trust_remote_code=True).eval()\n"
        "image = torch.linspace(-1, 1, 3 * 40 * 24).view(1, 3, 40, 24)\n"
        "print(*model(image).pooler_output[0, :6].tolist())\n"
    )
    finished = run_process([sys.executable, script], HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert finished.returncode == 0, finished.stderr
    found = torch.tensor([float(one) for one in finished.stdout.split()])
    torch.testing.assert_close(found, torch.tensor(FEATURES), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_before_goes_on(tmp_path, monkeypatch):
    shutil.copytree(RUN, tmp_path / "run")
    for name in ("model.safetensors", "config.json", "results.json"):  # as if it had been killed at step 2
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "pretraining")
    write_images(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    result = pretrain(out="run", data="images", config="run/recipe.yaml", resume_from_checkpoint="latest")
    assert result.results["steps"] == 4
    lines, before = read_log(tmp_path / "run" / "log.jsonl"), read_log(RUN / "log.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[:2] == before[:2]
    for line, old in zip(lines[2:], before[2:], strict=True):
        assert abs(line["loss"] - old["loss"]) < 1e-3 * old["loss"]
    found, expected = load_file(tmp_path / "run" / "model.safetensors"), load_file(RUN / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # a step is at most a learning rate of 1e-3; where a gradient is all rounding, another processor may turn it
        assert (found[name] - tensor).abs().mean() < 1e-4, name
