"""What benchmarks share: seconds of a step, extra memory of one, and the machine they are from."""

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers


def step(function: Callable[[], torch.Tensor], device: str) -> tuple[float, float]:
    """Return seconds of a forward pass, and of forward and backward together."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    output = function()
    synchronize()
    forward = time.perf_counter() - started
    output.backward(torch.ones_like(output))
    synchronize()
    return forward, time.perf_counter() - started


def extra_memory(function: Callable[[], torch.Tensor], small: Callable[[], torch.Tensor], device: str) -> int | None:
    """Return bytes of extra peak memory of one forward and backward pass; None where it cannot be read.

    Args:
        function: What to measure, once in a process of its own.
        small: The same on small inputs: thread pools and libraries are no part of it.
        device: `"cpu"` or `"cuda"`.
    """
    if device == "cuda":
        step(function, device)  # compiles, and fills caches and workspaces
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(function, device)
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    step(small, device)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    step(function, device)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Return a field of this process's memory in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def machine(device: str) -> dict:
    """Return what the figures depend on."""
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    info = Path("/proc/cpuinfo")
    if device == "cpu" and info.exists():
        found["device"] = next(
            (line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")),
            found["device"],
        )
    return found
