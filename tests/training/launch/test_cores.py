"""Cores that a container or a launcher leaves to a process."""

import os

import pytest
import torch

from hf_vicreg.training.launch import cores
from hf_vicreg.training.launch.cores import cpu_quotas, local_processes, usable_cores
from hf_vicreg.training.launch.distributed import set_threads
from hf_vicreg.training.planner.machine import this_machine


def _write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def group(tmp_path, monkeypatch):
    """A cgroup of version 2 that this process seems to be in."""
    (tmp_path / "self").write_text("0::/pod/one\n")
    monkeypatch.setattr(cores.cpu_quotas, "__defaults__", (tmp_path / "cgroup", tmp_path / "self"))
    return tmp_path / "cgroup" / "pod"


@pytest.mark.parametrize(("quota", "found"), [("150000 100000\n", [1.5]), ("max 100000\n", []), ("", [])])
def test_quotas_of_version_2_at_every_level(group, quota, found):
    _write(group, cpu__max=quota)
    _write(group / "one", cpu__max="max 100000\n")
    assert cpu_quotas() == found


def test_quota_of_version_1_and_of_a_container_whose_path_is_the_hosts(tmp_path):
    root = tmp_path / "cgroup"
    _write(root / "cpu", cpu__cfs_quota_us="200000\n", cpu__cfs_period_us="100000\n")
    (tmp_path / "self").write_text("5:cpuset:/x\n4:cpu,cpuacct:/docker/abc\n")
    assert cpu_quotas(root, tmp_path / "self") == [2.0]
    _write(root / "cpu", cpu__cfs_quota_us="-1\n")
    assert cpu_quotas(root, tmp_path / "self") == []
    assert cpu_quotas(root, tmp_path / "missing") == []


def test_threads_and_plans_keep_to_the_quota(group, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    assert usable_cores() == 64
    _write(group / "one", cpu__max="150000 100000\n")
    assert usable_cores() == 2
    threads = torch.get_num_threads()
    try:
        assert set_threads(1) == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert this_machine(torch.device("cpu")).cores == 2
    _write(group, cpu__max="10000 100000\n")
    assert usable_cores() == 1


@pytest.mark.parametrize(
    ("variables", "found"),
    [({}, 1), ({"LOCAL_WORLD_SIZE": "4"}, 4), ({"WORLD_SIZE": "8", "SLURM_TASKS_PER_NODE": "8"}, 1)],
)
def test_processes_that_share_a_machine(variables, found, monkeypatch):
    """A task that SLURM has bound to eight of 64 cores may use them all."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert local_processes() == found
