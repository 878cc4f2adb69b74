"""Trains a small model in double precision, its weights whole or shared out: arguments PATH STEPS SIZES CASE...

For each of the SIZES, joined by commas, so many processes share a copy of the weights. Rank 0 writes losses, norms and
whole weights into PATH, by name. Each process checks the share that it holds, that those of other copies are the same,
and how often gradients are summed.
"""

import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from hf_vicreg import BigBirdViTConfig, VicRegConfig, VicRegForPreTraining
from hf_vicreg.training.engine.average import WeightAverage
from hf_vicreg.training.engine.checkpoint import copied
from hf_vicreg.training.engine.optim import build_optimizer
from hf_vicreg.training.engine.two_pass import average_gradients, two_pass_backward
from hf_vicreg.training.launch.sharding import mesh_over, own_share, shard_weights, units_of, unsharded, whole

BATCH = 8
ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
IMAGES = {"image_size": 32, "patch_size": 8, "tile_size": 1, "num_random_blocks": 2, "pooling": "mean"}
SUMS = {}  # of a step of each case with whole weights
CASES = {"one-pass": 1, "two-passes": 2, "local-views": 1}


class Sums(TorchDispatchMode):
    """Counts the sums over processes."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op is torch.ops.c10d.allreduce_.default
        return op(*args, **(kwargs or {}))


def train(case, steps, shard_size):
    torch.manual_seed(0)
    config = VicRegConfig(encoder=BigBirdViTConfig(**ENCODER, **IMAGES), expander_sizes=[64, 64])
    model = VicRegForPreTraining(config).double().train()
    total = sum(one.numel() for one in model.parameters())
    units = sum(len(units_of(one)) for one in model.branches)
    rank, processes, pieces = dist.get_rank(), dist.get_world_size(), CASES[case]
    if shard_size is not None:
        mesh = mesh_over(torch.device("cpu"), shard_size)
        shape = (processes,) if shard_size == processes else (processes // shard_size, shard_size)
        assert mesh.shape == shape, (mesh.shape, shape)
        shard_weights(model, model.branches, torch.device("cpu"), mesh)
        assert {one.device_mesh for one in model.parameters()} == {mesh}
        own = sum(own_share(one).numel() for one in model.parameters())
        assert total / 1.1 < own * shard_size < 1.1 * total, (own, total)
    optimizer = build_optimizer(model, "adamw", 1e-3, 0.05, (0.9, 0.95))
    average = WeightAverage(model.encoders, 0.9)
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
        with Sums() as sums:
            outputs = two_pass_backward(model, parts, torch.Tensor.backward)
        # the gradient of each unit once, however many pieces, and of one copy not at all
        copies = shard_size not in (None, processes)
        own = SUMS.setdefault(case, sums.count)
        assert sums.count == own + copies * units, (sums.count, own)
        average_gradients(model.parameters())
        norm = torch.nn.utils.clip_grad_norm_(model.encoder.parameters(), 0.5)
        found[f"loss {step}"], found[f"norm {step}"] = outputs.loss.detach(), whole(norm).detach()
        optimizer.step()
        average.update()
        model.zero_grad()
    if shard_size is not None:
        state = sum(own_share(one).numel() for entry in optimizer.state.values() for one in entry.values())
        assert state * shard_size < 2.2 * total, (state, total)
        mine = torch.cat([own_share(one).detach().flatten() for one in model.parameters()])
        shares = [None] * processes
        dist.all_gather_object(shares, mine)
        assert torch.equal(mine, shares[rank % shard_size])  # of the first copy of the weights
        copy = unsharded(model)
        assert type(copy) is VicRegForPreTraining
        image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
        mine, other = unsharded(model.encoder).eval(), copy.encoder.eval()
        assert torch.equal(mine(image).pooler_output, other(image).pooler_output)
    for file, tensors in copied(model, optimizer, average, keep=rank == 0).items():
        found |= {f"{file} {name}": tensor for name, tensor in tensors.items()}
    return found


def main(path, steps, sizes, *cases):
    dist.init_process_group("gloo")
    found = {
        f"{case} {'whole' if size is None else f'shared by {size}'} {name}": tensor
        for case in cases
        for size in (None, *map(int, sizes.split(",")))
        for name, tensor in train(case, int(steps), size).items()
    }
    if dist.get_rank() == 0:
        save_file(found, path)
        print(f"{dist.get_world_size()} processes", flush=True)
    dist.destroy_process_group()


main(*sys.argv[1:])
