"""Kinds of devices other than one maker's GPUs: which launchers are taken, and what is asked of torch's modules."""

from types import ModuleType

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from hf_vicreg.training.engine.checkpoint import local_rng_states
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.launch.devices import (
    check_launcher,
    device_name,
    free_cache,
    has_bf16,
    restore_rng,
    rng_states,
    synchronize,
)
from hf_vicreg.training.launch.distributed import build_accelerator
from hf_vicreg.training.planner.choices import Images, _rung
from hf_vicreg.training.planner.machine import Machine, this_machine

REFUSED = {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA}
OTHER = "privateuseone"  # the kind that torch keeps for devices of others


@pytest.fixture
def state():
    """Accelerate's own state of one process."""
    yield build_accelerator("no", device="cpu").state
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("kind", sorted(DistributedType))
def test_a_launcher_is_taken_if_it_gives_each_process_a_device(kind, state):
    check_launcher(state.distributed_type)
    state.distributed_type = kind
    if state.distributed_type not in REFUSED:
        check_launcher(state.distributed_type)
        return
    with pytest.raises(InputError, match=rf"`distributed_type`: .* got {kind.value}; choose one of training/launch"):
        check_launcher(state.distributed_type)


@pytest.fixture
def other(monkeypatch):
    """A module of another maker's devices, as they are registered at torch's."""
    module = ModuleType(OTHER)
    module.state = torch.arange(3, dtype=torch.uint8)
    module.called = []
    module.get_rng_state = lambda device: module.state.clone()
    module.set_rng_state = lambda state, device: module.state.copy_(state)
    module.is_bf16_supported = lambda: True
    module.get_device_name = lambda device: "Other 9"
    module.mem_get_info = lambda device: (2**30, 2**31)
    module.synchronize = lambda: module.called.append("synchronize")
    module.empty_cache = lambda: module.called.append("empty_cache")
    monkeypatch.setattr(torch, OTHER, module, raising=False)
    torch.get_device_module.cache_clear()
    yield module
    torch.get_device_module.cache_clear()


def test_another_makers_device_is_asked_as_a_gpu_is(other):
    device = torch.device(OTHER)
    states = rng_states(device)
    drawn, other.state = torch.rand(2), torch.zeros(3, dtype=torch.uint8)
    restore_rng(states, device)
    assert torch.equal(torch.rand(2), drawn)
    assert other.state.tolist() == [0, 1, 2]
    synchronize(device)
    free_cache(device)
    assert other.called == ["synchronize", "empty_cache"]
    assert (device_name(device), has_bf16(OTHER)) == ("Other 9", True)
    machine = this_machine(device)
    assert (machine.device, machine.name, machine.memory) == (OTHER, "Other 9", 2**30)


def test_a_plan_takes_a_device_of_another_maker_for_a_gpu():
    of = [Machine(kind, "", 4, 2**33) for kind in (OTHER, "cuda")]
    images = Images(100_000, 64, 64, False)
    other, gpu = (_rung(images, machine, 3600.0, 64) for machine in of)
    assert other == gpu


def test_a_device_without_a_module_leaves_the_cpu_alone():
    device = torch.device("meta")
    assert len(rng_states(device)) == len(rng_states(torch.device("cpu"))) == 1
    assert (device_name(device), has_bf16("meta")) == ("meta", False)
    synchronize(device)
    free_cache(torch.device("cpu"))
    assert set(local_rng_states(3)) == {"3.cpu"}
