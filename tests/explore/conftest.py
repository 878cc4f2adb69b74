"""A folder of images with hostile names, copies and odd ones, an untrained encoder, and a server of their explorer."""

import contextlib
import socket
import threading
import time

import numpy as np
import pytest
import torch
import uvicorn
from huggingface_hub import constants
from PIL import Image

from hf_vicreg import BigBirdViTConfig, BigBirdViTImageProcessor, BigBirdViTModel
from hf_vicreg.explore.explorer import open_explorer
from hf_vicreg.explore.server import application

HOSTILE = "<img src=x onerror=alert(1)>'\"</script>\x07\x1b[31m&lt;"
BROKEN_LINE = "two\nlines"
COUNT, COPIES = 60, 6


def smooth(index, side=32):
    """Return a picture of three soft waves, another one for each index."""
    generator = np.random.default_rng(index)
    y, x = np.mgrid[0:side, 0:side] / side
    waves = [np.sin(6 * (a * x + b * y) + c) for a, b, c in generator.uniform(-1, 1, (3, 3))]
    return Image.fromarray((127 + 120 * np.stack(waves, -1)).astype(np.uint8))


def write_images(folder):
    (folder / "sub").mkdir(parents=True)
    for index in range(COUNT):
        hostile = {0: HOSTILE.replace("</", "<|"), 1: BROKEN_LINE, 2: "=sum,1", 5: "carriage\rreturn"}
        smooth(index).save(folder / f"{hostile.get(index, f'sub/{index:03d}')}.png")
    for index in range(10, 10 + COPIES):
        (folder / f"copy_{index:03d}.png").write_bytes((folder / "sub" / f"{index:03d}.png").read_bytes())
    noise = np.random.default_rng(0).integers(0, 2, (32, 32, 1), dtype=np.uint8) * 255
    Image.fromarray(noise.repeat(3, -1)).save(folder / "odd.png")
    (folder / "broken.png").write_bytes(b"no image")


def write_encoder(folder, seed=0, channels=3, **processing):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = BigBirdViTConfig(**sizes, image_size=32, patch_size=8, pooling="mean", tile_size=1, num_channels=channels)
    BigBirdViTModel(config).save_pretrained(folder)
    BigBirdViTImageProcessor(size={"height": 32, "width": 32}, **processing).save_pretrained(folder)


@pytest.fixture(scope="session")
def images(made_once):
    return made_once("explored_images", write_images)


@pytest.fixture(scope="session")
def encoder(made_once):
    return made_once("explored_encoder", write_encoder)


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def explorer(images, encoder, _home):
    return open_explorer(images, encoder, num_workers=0)


@contextlib.contextmanager
def serving(explorer, token=None):
    """Serve an explorer on loopback, from a thread of this process; gives its port."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        server = uvicorn.Server(uvicorn.Config(application(explorer, token), log_level="warning", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 60
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.started
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def port(explorer):
    with serving(explorer) as found:
        yield found
