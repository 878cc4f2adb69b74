"""A loop whose device is pretended; run by a launcher, it notes what its processes waited for in each step.

Usage: worker_pretend_device.py EXPECTED_WORLD_SIZE SETTINGS_JSON FOLDER
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState

from hf_vicreg.modeling import pattern_tables
from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.training.engine.pretraining import pretraining_loop
from hf_vicreg.training.images.run_images import load_images
from hf_vicreg.training.launch.distributed import build_accelerator
from hf_vicreg.training.launch.signals import StopRequest
from hf_vicreg.training.run.resolve import resolve
from tests.pretend_device import DEVICE, PretendDevice


@contextlib.contextmanager
def device_loop(settings):
    """Yields a loop on the pretended device, and that device."""
    disabled, autocast = pattern_tables._disable_current_modes, torch.autocast

    def known(kind, **others):
        return autocast("cpu" if kind == DEVICE.type else kind, **others)

    # the device is a mode of torch's, and tables are made outside of all modes: they shall be made on it;
    # autocast, off in the loss, knows no such type of device
    pattern_tables._disable_current_modes, torch.autocast = contextlib.nullcontext, known
    config = resolve(settings)
    accelerator = build_accelerator("no", device="cpu")
    os.environ.pop("ACCELERATE_USE_CPU", None)  # a state made later would find that this is no CPU
    PartialState().device = accelerator.state.device = DEVICE
    source, _, _ = load_images(config)
    torch.manual_seed(0)
    try:
        with PretendDevice() as device:
            model = VicRegForPreTraining(config.vicreg)
            folder = Path(config.run.output_dir)
            yield pretraining_loop(config, source, model, accelerator, None, StopRequest(folder, None)), device
    finally:
        pattern_tables._disable_current_modes, torch.autocast = disabled, autocast
        AcceleratorState._reset_state()
        PartialState._reset_state()


def reads_of_steps(loop, device):
    """Take all steps, and return what each waited for."""
    loop.step.train_mode()
    reads = []
    for batches in zip(*[iter(loop.step.batches(0))] * loop.step.pieces, strict=True):
        device.reads.clear()
        loop._take(batches)
        loop.state.step += 1
        reads.append([place for _, place in device.reads])
    return reads


def main():
    world_size, settings, folder = int(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
    with device_loop(settings) as (loop, device):
        if loop.accelerator.num_processes != world_size:
            raise SystemExit(f"expected {world_size} processes, got {loop.accelerator.num_processes}")
        found = {"reads": reads_of_steps(loop, device), "collectives": device.collectives}
        path = folder / f"{loop.accelerator.process_index}.json"
    path.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
