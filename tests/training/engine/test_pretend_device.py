"""What a GPU would refuse or wait for, seen without one: steps of pretraining on a pretended device."""

import json
from pathlib import Path

import pytest
import torch

from tests.pretend_device import MixedDevicesError
from tests.training.engine.worker_pretend_device import device_loop, reads_of_steps

WORKER = Path(__file__).with_name("worker_pretend_device.py")
KINDS = {
    "vicreg": {"views": {"num_local_views": 1, "local_image_size": 16}, "ema_decay": 0.9},
    "two passes": {"batch_size": 4, "statistics_batch_size": 8, "objective": "simclr"},
    "vicregl": {"objective": "vicregl"},
    "byol": {"objective": "byol"},
}


@pytest.fixture
def settings(tiny_recipe, tmp_path, image_folder):
    """Returns a function from changes to the settings of two steps."""
    images = image_folder(16)

    def make(**changes):
        own = {"train_dir": str(images), "output_dir": str(tmp_path / "run"), "batch_size": 8, "max_steps": 2}
        return tiny_recipe | own | changes

    return make


def assert_one_read(first, second):
    """Check that a step waits where it reads, and the first one for the tables that are kept."""
    assert ["read_once" in one for one in second[:1]] == [True], second
    assert {one.split()[-1] for one in first} - {one.split()[-1] for one in second} <= {"dense_bias"}, first
    assert len([one for one in first if "dense_bias" not in one]) == 1, first


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_once_from_its_device_and_mixes_none(settings, kind):
    changes = dict(KINDS[kind])
    changes["views"] = settings().get("views", {}) | changes.get("views", {})
    with device_loop(settings(**changes)) as (loop, device):
        first, second = reads_of_steps(loop, device)
    assert_one_read(first, second)
    # torch's own count of averages lies on the CPU, and goes along
    assert [one.split()[0].split(":")[0] for one in second[1:]] == ["average.py"] * ("ema_decay" in changes)


def test_a_table_left_on_the_cpu_is_refused(settings):
    with device_loop(settings()) as (loop, device):
        loop.step.model.encoder.layernorm.register_forward_hook(lambda *call: call[2][:, torch.arange(17)])
        with pytest.raises(MixedDevicesError, match=r"aten.index.Tensor: expected tensors of one device"):
            reads_of_steps(loop, device)


def test_a_number_read_on_the_way_is_counted(settings):
    with device_loop(settings()) as (loop, device):
        loop.step.model.encoder.layernorm.register_forward_hook(lambda *call: call[2] * call[2].sum().sign().item())
        assert len(reads_of_steps(loop, device)[1]) == 2


@pytest.mark.distributed
def test_two_processes_read_once_and_send_what_nccl_takes(settings, ranks, tmp_path):
    finished = ranks(2, WORKER, 2, json.dumps(settings()), tmp_path)
    assert finished.returncode == 0, finished.stderr[-3000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert_one_read(*found["reads"])
        assert len(found["reads"][1]) == 1
        assert found["collectives"] > 10
