"""A Hub that does not answer is not one without an image processor: nothing else normalises images in its place."""

import json
import sys

import pytest

PROGRAM = """
from hf_vicreg.convert import _processor
from hf_vicreg.training.evaluation.encoder import load_vision_encoder
for ask in (lambda: load_vision_encoder("writer/m").processor.image_mean, lambda: _processor("writer/m")):
    try:
        print(ask())
    except ValueError as error:
        print(error)
"""
OURS = "(0.485, 0.456, 0.406)\nNone\n"  # ImageNet's, and nothing to take along
NO_ANSWER = "got no answer from the Hub; try again"


@pytest.fixture
def load(hub, run_folder, run_process, environment):
    """Returns a function that loads a model from the Hub in a process of its own and returns what that prints."""
    files = {name: (run_folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    hub.create("writer/m", files=files)

    def do(program=PROGRAM, **extra):
        finished = run_process([sys.executable, "-c", program], **environment | extra)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    def add(mean):
        processor = json.loads((run_folder / "preprocessor_config.json").read_text()) | {"image_mean": [mean] * 3}
        hub.commit("writer/m", {"preprocessor_config.json": json.dumps(processor).encode()})

    do.add_processor = add
    return do


def told(printed):
    """Whether both were told of it, in a line each."""
    lines = printed.splitlines()
    return len(lines) == 2 and all(NO_ANSWER in line for line in lines)


def test_no_answer_is_an_error_and_a_missing_processor_is_none(hub, load):
    assert load() == OURS
    assert load(HF_HUB_OFFLINE="1") == OURS  # as the cache remembers
    load.add_processor(0.1)
    hub.fault("GET", "preprocessor_config.json", 403)
    assert told(load())


@pytest.mark.slow  # two processes more; the other test has the same line from a Hub
def test_a_cache_without_the_processor_says_nothing_offline(load):
    load.add_processor(0.1)
    load("from transformers import AutoModel; import hf_vicreg; AutoModel.from_pretrained('writer/m')")
    assert told(load(HF_HUB_OFFLINE="1"))
