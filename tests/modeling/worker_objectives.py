"""Run by torchrun: gradients of every objective from one process's share, averaged; rank 0 writes them into a file.

Usage: worker_objectives.py EXPECTED_WORLD_SIZE OUTPUT_FILE
"""

import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from hf_vicreg import VicRegConfig, VicRegForPreTraining
from hf_vicreg.modeling.objectives import OBJECTIVES, kinds_of
from hf_vicreg.training.engine.two_pass import average_gradients, two_pass_backward

SEVERAL = ("mae+vicreg", "vicregl+byol+sigreg")
NAMES = (*OBJECTIVES, *SEVERAL)
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
SETTINGS = {"sigreg": {"num_slices": 20}, "vicregl": {"num_matches": [5, 2], "local_expander_sizes": [12, 12]}}
SETTINGS |= {
    "mae+vicreg": {"weights": {"vicreg": 0.04}},
    "vicregl+byol+sigreg": SETTINGS | {"weights": {"vicregl": 0.1, "byol": 2, "sigreg": 3}},
}


def dtypes_of(name):
    return (torch.float64,) if name in SEVERAL else (torch.float64, torch.float32)


def build_model(name, dtype=torch.float64, **fields):
    torch.manual_seed(1)
    fields = {"expander_sizes": [24, 20], "objective_settings": SETTINGS.get(name)} | fields
    model = VicRegForPreTraining(VicRegConfig(encoder=ENCODER, objective=name, **fields)).to(dtype).train()
    model.begin_step(0, 10)
    with torch.no_grad():  # a teacher that is not its student
        for parameter in (one for part in model.objective.teachers for one in part.parameters()):
            parameter.mul_(1.1)
    return model


def batch_of(name, dtype=torch.float64, count=12):
    draws = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=draws, dtype=torch.float64).to(dtype)

    batch = {"pixel_values": draw(count, 2, 3, 16, 16), "local_pixel_values": draw(count, 2, 3, 8, 8)}
    return batch | ({"geometry": draw(count, 4, 6)} if any(one.needs_tokens for one in kinds_of(name)) else {})


def share(batch, rank, world_size):
    return {key: one.chunk(world_size)[rank] for key, one in batch.items()}


def gradients(model):
    return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])


def main():
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size != int(sys.argv[1]):
        raise SystemExit(f"expected {sys.argv[1]} processes, got {world_size}")
    results = {"world_size": torch.tensor(world_size)}
    for name in NAMES:
        for dtype in dtypes_of(name):
            for pieces in (1, 2) if dtype == torch.float64 else (2,):
                model = build_model(name, dtype)
                own = share(batch_of(name, dtype), rank, world_size)
                parts = [share(own, piece, pieces) for piece in range(pieces)]
                outputs = two_pass_backward(model, [lambda one=one: one for one in parts], torch.Tensor.backward)
                average_gradients(model.parameters())
                key = f"{name}_{str(dtype).removeprefix('torch.')}_{pieces}"
                results |= {f"{key}_gradient": gradients(model), f"{key}_loss": outputs.loss.detach()}
        # the known wrong form: every process's loss of its own share
        model = build_model(name)
        model._process_group = lambda: None
        model(**share(batch_of(name), rank, world_size)).loss.backward()
        average_gradients(model.parameters())
        results[f"{name}_wrong"] = gradients(model)
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in results.items()}, sys.argv[2])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
