"""Install a wheel into an environment of its own and use it as a stranger would: version, training, loading.

Usage: check_wheel.py DIST

The environment has the packages of this one through a `.pth` file, but not the checkout: an editable install is found
by a `.pth` file too, and those are not read there.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

NEEDED = [
    "hf_vicreg/py.typed",
    "hf_vicreg/report/page.css",
    "hf_vicreg/report/page.js",
    "hf_vicreg/explore/index.html",
    "hf_vicreg/explore/map.js",
    "hf_vicreg/training/recipes/digits.yaml",
    "hf_vicreg/training/launch/",
    "hf_vicreg/model_cards/template.md",
    "hf_vicreg/model_cards/digits/model.safetensors",
    "hf_vicreg/model_cards/cifar10_cpu/model.safetensors",
    "hf_vicreg/model_cards/cifar10_cpu_long/config.json",
    "hf_vicreg/modeling/modeling_vicreg.py",
]
FLAGS = ["--config", "digits", "--max_steps", "20", "--max_train_samples", "320", "--batch_size", "16"]
FLAGS += ["--knn_train_samples", "64", "--knn_test_samples", "32", "--knn_every_epochs", "0"]
LOAD = """
import sys, torch, hf_vicreg
from transformers import AutoModel
assert "site-packages" in hf_vicreg.__file__, hf_vicreg.__file__
model = AutoModel.from_pretrained(sys.argv[1])
size = model.config.image_size
outputs = model(pixel_values=torch.zeros(2, 3, size, size))
assert outputs.pooler_output.shape == (2, model.config.hidden_size)
assert hf_vicreg.load("digits").config.model_type == "bigbird_vit"
"""


def check_contents(wheel: Path) -> None:
    """Raise SystemExit if the wheel lacks a file or has one too many."""
    names = zipfile.ZipFile(wheel).namelist()
    for needed in NEEDED:
        if not any(name.startswith(needed) for name in names):
            raise SystemExit(f"{wheel.name}: expected {needed}, found none")
    for name in names:
        if not name.startswith(("hf_vicreg/", "hf_vicreg-")) or "test" in Path(name).name.lower():
            raise SystemExit(f"{wheel.name}: expected the package alone, found {name}")


def main() -> None:
    (wheel,) = Path(sys.argv[1]).resolve().glob("hf_vicreg-*.whl")
    check_contents(wheel)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

        def run(*command: object) -> str:
            finished = subprocess.run(
                [str(part) for part in command],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            if finished.returncode:
                raise SystemExit(f"{command}: exit code {finished.returncode}\n{finished.stdout}{finished.stderr}")
            return finished.stdout

        run(sys.executable, "-m", "venv", "--without-pip", "clean")
        python = folder / "clean" / "bin" / "python"
        (site,) = (folder / "clean").glob("lib/python*/site-packages")
        install = ["install", "--quiet", "--no-deps", "--no-index", wheel]
        run(sys.executable, "-m", "pip", "--python", python, *install)
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        command = folder / "clean" / "bin" / "hf-vicreg"
        version = wheel.name.split("-")[1]
        if version not in run(command, "--version"):
            raise SystemExit(f"hf-vicreg --version: expected {version}")
        run(command, "pretrain", *FLAGS, "--output_dir", folder / "run")
        run(python, "-c", LOAD, folder / "run")
    print(f"{wheel.name}: installed, trained 20 steps, loaded")


if __name__ == "__main__":
    main()
