"""Run by torchrun: the gradient of two passes over this process's pieces, averaged over processes.

Usage: worker_two_pass.py EXPECTED_WORLD_SIZE OUTPUT_FILE
"""

import sys

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import save_file

from hf_vicreg import VicRegConfig, VicRegForPreTraining
from hf_vicreg.training.engine.two_pass import average_gradients, two_pass_backward

ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 4,
    "tile_size": 1,
    "num_random_blocks": 1,
}


EXPANDERS = [("batch", 32), ("layer", 12)]  # covariances of 24 samples by the Gram matrix, and by moments


def build_model(norm, width=32, **changes):
    torch.manual_seed(1)
    config = VicRegConfig(encoder=ENCODER | changes, expander_sizes=[24, width], expander_norm=norm)
    return VicRegForPreTraining(config).double().train()


def images(num_local=0):
    generator = torch.Generator().manual_seed(3)
    found = {"pixel_values": torch.randn(24, 2, 3, 16, 16, generator=generator, dtype=torch.float64)}
    if num_local:
        found["local_pixel_values"] = torch.randn(24, num_local, 3, 8, 8, generator=generator, dtype=torch.float64)
    return found


def split(batch, count):
    """The same batch in `count` pieces."""
    return [{name: one.chunk(count)[index] for name, one in batch.items()} for index in range(count)]


def gradient(model):
    return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])


def main():
    accelerator = Accelerator(cpu=True)
    if accelerator.num_processes != int(sys.argv[1]):
        raise SystemExit(f"expected {sys.argv[1]} processes, got {accelerator.num_processes}")
    results = {"world_size": torch.tensor(accelerator.num_processes)}
    for norm, width in EXPANDERS:
        model = build_model(norm, width)
        accelerator.prepare(model)  # DistributedDataParallel around it must not be in the way
        share = split(images(num_local=2), accelerator.num_processes)[accelerator.process_index]
        pieces = [lambda piece=piece: piece for piece in split(share, 3)]
        outputs = two_pass_backward(model, pieces, accelerator.backward)
        average_gradients(model.parameters())
        results |= {f"{norm}_loss": outputs.loss.detach(), f"{norm}_gradient": gradient(model)}
    if accelerator.is_main_process:
        save_file(results, sys.argv[2])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
