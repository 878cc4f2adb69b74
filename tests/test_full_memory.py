"""A command that needs more memory than there is: one line and exit code 2, and what other errors say stays."""

import contextlib
import sys
from pathlib import Path

import datasets  # noqa: F401 - what the command imports, it has before the limit is set
import pytest
import sklearn.datasets  # noqa: F401
import torch

from hf_vicreg.cli import main
from hf_vicreg.training import pretrain  # noqa: F401
from hf_vicreg.training.errors import FullMemoryError, memory_to_hold

WIDE = "--batch_size 1024 --model.num_hidden_layers 1 --model.intermediate_size 65536"
PRETRAIN = f"pretrain digits {WIDE} --max_steps 1 --dataloader_num_workers 0 --knn_every_epochs 0".split()


@contextlib.contextmanager
def room_for(megabytes):
    """Let this process take so much more memory than it has."""
    import resource

    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (has + megabytes * 2**20, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_AS and /proc")
def test_a_step_that_does_not_fit_is_told_in_one_line(tmp_path, capsys):
    with room_for(1500):
        code = main([*PRETRAIN, "--output_dir", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert code == 2, said
    assert said.count("error: ") == 1
    assert "error: memory: expected what is held at once to fit into this machine's memory" in said
    assert "you tried to allocate" in said


@pytest.mark.parametrize(
    ("raised", "where"),
    [(torch.OutOfMemoryError("CUDA out of memory.\nTried"), "the device's memory"), (MemoryError(), "this machine's")],
)
def test_what_torch_and_python_raise_is_told_with_the_remedy(raised, where):
    with (
        pytest.raises(FullMemoryError, match=f"fit into {where}.* take a smaller batch"),
        memory_to_hold(),
    ):
        raise raised


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match=r"^shapes$"), memory_to_hold():
        raise RuntimeError("shapes")
