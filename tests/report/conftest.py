"""A finished run of images with hostile names, hostile text in its files, and its page: made once for all workers."""

import json

import pytest
import torch
import yaml
from PIL import Image

from hf_vicreg import pretrain
from hf_vicreg.report.report import write_report

HOSTILE = "\"'><img src=x onerror=alert(1)></script><script>alert(2)</script>\x1b[31m\u202e&lt;"
NAME = '<b onclick="alert(3)">\'\x07'  # what a file may be called, too


def noise(index, size=36):
    generator = torch.Generator().manual_seed(index)
    return Image.fromarray(torch.randint(0, 256, (size, size, 3), dtype=torch.uint8, generator=generator).numpy())


@pytest.fixture(scope="session")
def images(made_once):
    """Two classes, one with a hostile name, in splits; one of the files cannot be read."""

    def make(folder):
        for split, count in (("train", 24), ("test", 8)):
            for label in (NAME, "plain"):
                place = folder / split / label
                place.mkdir(parents=True)
                for index in range(count):
                    noise(len(label) * 1000 + index).save(place / f"{index}{NAME}.png")
        (folder / "test" / "plain" / "broken.png").write_bytes(b"no image")

    return made_once("report_images", make)


@pytest.fixture(scope="session")
def run(made_once, images, request):
    """A finished run, its log and results with text and numbers that no run would write."""
    conftest = request.config.pluginmanager.get_plugin(str(request.config.rootpath / "tests" / "conftest.py"))

    def make(folder):
        threads = torch.get_num_threads()
        pretrain(out=folder, data=images / "train" / "plain", **conftest.TINY_RECIPE | {"batch_size": 8})
        torch.set_num_threads(threads)
        log = folder / "log.jsonl"
        planted = {"step": 3, "loss": float("nan"), HOSTILE: 1.0, "x": HOSTILE}
        log.write_text("\n".join([*log.read_text().splitlines(), json.dumps(planted)]) + "\n")
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"report_to": HOSTILE}))
        results = json.loads((folder / "results.json").read_text())
        (folder / "results.json").write_text(json.dumps(results | {"dataset": HOSTILE, "hardware": HOSTILE}))

    return made_once(f"mine {NAME}", make)


@pytest.fixture(scope="session")
def page_file(made_once, run, images):
    return made_once("report.html", lambda path: write_report(run, data=str(images), output=path))
