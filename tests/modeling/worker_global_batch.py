"""Run by torchrun: losses and gradients of one process's share, gathered by rank 0 into a file.

Usage: worker_global_batch.py EXPECTED_WORLD_SIZE OUTPUT_FILE
"""

import sys
import warnings

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from hf_vicreg import VicRegConfig, VicRegForPreTraining, vicreg_loss
from hf_vicreg.modeling.vicreg_loss import VicRegTerms
from hf_vicreg.training.engine.optim import build_optimizer

SHAPES = [(12, 40), (24, 7)]  # N < D: Gram rows; N >= D: moments
ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 4,
    "tile_size": 1,
    "num_random_blocks": 1,
}


def embeddings(num_samples, dimensions, dtype):
    generator = torch.Generator().manual_seed(num_samples)
    z_a = torch.randn(num_samples, dimensions, generator=generator, dtype=torch.float64) * 0.7
    z_b = z_a + 0.3 * torch.randn(num_samples, dimensions, generator=generator, dtype=torch.float64)
    return z_a.to(dtype), z_b.to(dtype)


def build_model(norm, dtype, position="rope"):
    torch.manual_seed(1)
    config = VicRegConfig(
        encoder=ENCODER | {"position_embedding_type": position}, expander_sizes=[24, 32], expander_norm=norm
    )
    return VicRegForPreTraining(config).to(dtype).train()


def images(dtype):
    return torch.randn(12, 2, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def share(tensor, rank, world_size):
    return tensor.chunk(world_size)[rank]


def flat_gradient(model):
    return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])


def walk(model, inputs, call):
    """Twenty steps of AdamW; returns the weights by name."""
    optimizer = build_optimizer(model, "adamw", 1e-3, 0.05, (0.9, 0.95))
    for _ in range(20):
        optimizer.zero_grad()
        call(pixel_values=inputs).loss.backward()
        optimizer.step()
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def main():
    warnings.filterwarnings("error", message=".*torch.distributed.*deprecated.*")
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size != int(sys.argv[1]):
        raise SystemExit(f"expected {sys.argv[1]} processes, got {world_size}")
    results = {"world_size": torch.tensor(world_size)}

    for shape in SHAPES:
        leaves = [share(z, rank, world_size).clone().requires_grad_() for z in embeddings(*shape, torch.float64)]
        for name, group, scale in (("exact", dist.group.WORLD, 1 / world_size), ("per_process", None, 1 / world_size)):
            parts: VicRegTerms = vicreg_loss(*leaves, process_group=group)
            gradient = torch.cat(torch.autograd.grad(parts.loss, leaves), dim=1) * scale
            gathered = [torch.empty_like(gradient) for _ in range(world_size)]
            dist.all_gather(gathered, gradient)
            results[f"{name}_{shape[0]}_gradient"] = torch.cat(gathered)
            results[f"{name}_{shape[0]}_loss"] = parts.loss.detach()
        # the other known wrong form: all embeddings gathered, but a gradient through this process's own alone
        whole = []
        for leaf in leaves:
            gathered = [torch.empty_like(leaf) for _ in range(world_size)]
            dist.all_gather(gathered, leaf.detach())
            whole.append(torch.cat([leaf if one == rank else gathered[one] for one in range(world_size)]))
        gradient = torch.cat(torch.autograd.grad(vicreg_loss(*whole).loss, leaves), dim=1) / world_size
        gathered = [torch.empty_like(gradient) for _ in range(world_size)]
        dist.all_gather(gathered, gradient)
        results[f"own_gradient_{shape[0]}_gradient"] = torch.cat(gathered)

    for norm in ("batch", "layer"):
        for dtype in (torch.float64, torch.float32):
            model = build_model(norm, dtype)
            parallel = DistributedDataParallel(model)
            outputs = parallel(pixel_values=share(images(dtype), rank, world_size))
            outputs.loss.backward()
            key = f"{norm}_{str(dtype).removeprefix('torch.')}"
            results[f"{key}_gradient"] = flat_gradient(model)
            results[f"{key}_loss"] = outputs.loss.detach()
            if norm == "batch":
                results[f"{key}_running"] = torch.cat(
                    [model.expander.norm[0].running_mean, model.expander.norm[0].running_var]
                )

    for position in ("rope", "absolute"):
        model = build_model("batch", torch.float32, position)
        weights = walk(model, share(images(torch.float32), rank, world_size), DistributedDataParallel(model))
        results |= {f"walk_{position}.{name}": one for name, one in weights.items()}

    # a loss computed on one rank alone must not wait for the others
    if rank == 0:
        model.eval()(pixel_values=images(torch.float32))
    # unequal or bad shares are refused on every rank, without a hang
    z = torch.zeros(4, 6)
    for name, views in (
        ("samples", [torch.zeros(2 + rank, 4)] * 2),
        ("views", [z] * (3 + rank)),
        ("shapes", [z, z, torch.zeros(4 - min(rank, 1), 6)]),
        ("types", [z, z.long() if rank else z]),
    ):
        try:
            vicreg_loss(*views[:2], local_views=views[2:], process_group=dist.group.WORLD)
        except ValueError as error:
            refused = "every process" in str(error) or (rank > 0 and "expected" in str(error))
        else:
            refused = False
        everyone = [None] * world_size
        dist.all_gather_object(everyone, refused)
        results[f"{name}_refused"] = torch.tensor(all(everyone))
    for norm in ("batch", "layer"):
        model = build_model(norm, torch.float32)
        local = torch.zeros(4, 1 + rank, 3, 8, 8)
        try:
            model(pixel_values=torch.zeros(4, 2, 3, 16, 16), local_pixel_values=local)
        except ValueError as error:
            refused = "every process" in str(error)
        else:
            refused = False
        everyone = [None] * world_size
        dist.all_gather_object(everyone, refused)
        results[f"{norm}_views_refused"] = torch.tensor(all(everyone))
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in results.items()}, sys.argv[2])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
