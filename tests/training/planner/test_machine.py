"""Memory limits of containers, read from files as the kernel writes them; and this process's own figures."""

import subprocess
import sys

import pytest
import torch

from hf_vicreg.training.planner import machine
from hf_vicreg.training.planner.machine import Machine, cgroup_limits, this_machine

MEGABYTE = 2**20


def _write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_limits_of_version_2_at_every_level(tmp_path):
    root = tmp_path / "cgroup"
    _write(root)
    _write(
        root / "a", **{"memory.max": "1000\n", "memory.current": "400\n", "memory.stat": "anon 1\ninactive_file 100\n"}
    )
    _write(root / "a" / "b", **{"memory.max": "max\n", "memory.current": "300\n"})
    (tmp_path / "self").write_text("0::/a/b\n")
    assert cgroup_limits(root, tmp_path / "self") == [(1000, 300)]


def test_limit_of_version_1_and_of_a_container_whose_path_is_the_hosts(tmp_path):
    root = tmp_path / "cgroup"
    files = {
        "memory.limit_in_bytes": "5000",
        "memory.usage_in_bytes": "4000",
        "memory.stat": "total_inactive_file 500",
    }
    _write(root / "memory", **files)
    (tmp_path / "self").write_text("5:cpu:/x\n4:memory:/docker/abc\n0::/other\n")
    assert cgroup_limits(root, tmp_path / "self") == [(5000, 3500)]
    assert cgroup_limits(root, tmp_path / "missing") == []


def test_unlimited_groups_do_not_count(tmp_path):
    root = tmp_path / "cgroup"
    _write(root / "memory", **{"memory.limit_in_bytes": str(2**63 - 4096), "memory.usage_in_bytes": "1"})
    (tmp_path / "self").write_text("4:memory:/\n")
    assert cgroup_limits(root, tmp_path / "self") == []


def test_this_machine_holds_what_it_says():
    found = this_machine(torch.device("cpu"))
    assert found.memory > machine.resident_memory() > 10 * MEGABYTE
    assert this_machine(torch.device("cpu"), max_memory=100 * MEGABYTE).memory == 100 * MEGABYTE
    half = this_machine(torch.device("cpu"), local_processes=2)
    assert half.memory < 0.75 * found.memory
    assert half.cores == max(1, found.cores // 2)


def test_what_other_processes_hold_is_taken_off_once(monkeypatch):
    """They have met when it is asked, so that what is available is without what they hold."""
    monkeypatch.setattr(machine, "resident_memory", lambda: 800 * MEGABYTE)
    monkeypatch.setattr(machine, "available_memory", lambda: (16_000 - 8 * 800) * MEGABYTE)
    assert this_machine(torch.device("cpu"), local_processes=8).memory == 2000 * MEGABYTE


def test_the_peak_is_that_of_since_the_reset():
    program = """
import sys
from hf_vicreg.training.planner.machine import peak_memory, reset_peak
held = bytearray(b"x") * 300_000_000
before = peak_memory()
del held
if not reset_peak():
    print("cannot"); raise SystemExit
after = peak_memory()
held = bytearray(b"x") * 100_000_000
print(before - after > 200_000_000, peak_memory() - after > 90_000_000)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    if done.stdout.strip() == "cannot":
        pytest.skip("this system keeps the peak of a process for good")
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_usable_memory_leaves_room():
    assert Machine("cpu", "", 1, 1000).usable_memory == 900
