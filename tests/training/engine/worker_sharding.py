"""Trains a small model in double precision, its weights whole or shared out: arguments PATH STEPS CASE...

Rank 0 writes losses, norms and whole weights into PATH, by name; the share that a process holds is checked on each.
"""

import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from hf_vicreg import BigBirdViTConfig, VicRegConfig, VicRegForPreTraining
from hf_vicreg.training.engine.average import WeightAverage
from hf_vicreg.training.engine.checkpoint import copied
from hf_vicreg.training.engine.optim import build_optimizer
from hf_vicreg.training.engine.two_pass import average_gradients, two_pass_backward
from hf_vicreg.training.launch.sharding import own_share, shard_weights, unsharded, whole

BATCH = 8
ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
IMAGES = {"image_size": 32, "patch_size": 8, "tile_size": 1, "num_random_blocks": 2, "pooling": "mean"}
CASES = {"one-pass": 1, "two-passes": 2, "local-views": 1}


def train(case, steps, *, shared):
    torch.manual_seed(0)
    config = VicRegConfig(encoder=BigBirdViTConfig(**ENCODER, **IMAGES), expander_sizes=[64, 64])
    model = VicRegForPreTraining(config).double().train()
    total = sum(one.numel() for one in model.parameters())
    if shared:
        shard_weights(model, model.branches, torch.device("cpu"))
        own = sum(own_share(one).numel() for one in model.parameters())
        assert own < 1.1 * total / dist.get_world_size(), (own, total)
    optimizer = build_optimizer(model, "adamw", 1e-3, 0.05, (0.9, 0.95))
    average = WeightAverage(model.encoders, 0.9)
    rank, processes, pieces = dist.get_rank(), dist.get_world_size(), CASES[case]
    found = {}
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        pixels = torch.randn(BATCH, 2, 3, 32, 32, generator=generator, dtype=torch.float64)
        small = torch.randn(BATCH, 2, 3, 16, 16, generator=generator, dtype=torch.float64)

        def piece(pixels, small):
            inputs = {"pixel_values": pixels}
            return (lambda: inputs | {"local_pixel_values": small}) if case == "local-views" else lambda: inputs

        # each piece is shared by the processes, as a loader's batch is
        parts = [
            piece(*(one.chunk(processes)[rank] for one in part))
            for part in zip(pixels.chunk(pieces), small.chunk(pieces), strict=True)
        ]
        outputs = two_pass_backward(model, parts, torch.Tensor.backward)
        average_gradients(model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(model.encoder.parameters(), 0.5)
        found[f"loss {step}"], found[f"norm {step}"] = outputs.loss.detach(), whole(norm).detach()
        optimizer.step()
        average.update()
        model.zero_grad()
    if shared:
        state = sum(own_share(one).numel() for entry in optimizer.state.values() for one in entry.values())
        assert state < 2.2 * total / processes, (state, total)
        copy = unsharded(model)
        assert type(copy) is VicRegForPreTraining
        image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
        mine, other = unsharded(model.encoder).eval(), copy.encoder.eval()
        assert torch.equal(mine(image).pooler_output, other(image).pooler_output)
    for file, tensors in copied(model, optimizer, average, keep=rank == 0).items():
        found |= {f"{file} {name}": tensor for name, tensor in tensors.items()}
    return found


def main(path, steps, *cases):
    dist.init_process_group("gloo")
    found = {
        f"{case} {'shared' if shared else 'whole'} {name}": tensor
        for case in cases
        for shared in (False, True)
        for name, tensor in train(case, int(steps), shared=shared).items()
    }
    if dist.get_rank() == 0:
        save_file(found, path)
        print(f"{dist.get_world_size()} processes", flush=True)
    dist.destroy_process_group()


main(*sys.argv[1:])
