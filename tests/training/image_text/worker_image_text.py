"""Run in several processes: the gradient of images and captions in two passes over pieces, averaged over processes.

Usage: worker_image_text.py EXPECTED_WORLD_SIZE OUTPUT_FILE
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
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 4,
    "tile_size": 1,
    "num_random_blocks": 1,
}
TEXTS = {
    "model_type": "distilbert",
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 24,
    "vocab_size": 40,
    "max_position_embeddings": 12,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
# the loss, the norm of the expander, and the weight of a second view of the images
LOSSES = [
    ("vicreg", "batch", 0),
    ("infonce", "layer", 0),
    ("siglip", "batch", 0),
    ("vicreg", "batch", 0.6),
    ("infonce", "batch", 0.3),
]


def build_model(pair_loss, norm, image_pair_weight=0, **changes):
    torch.manual_seed(1)
    config = VicRegConfig(
        encoder=ENCODER,
        second_encoder=TEXTS | changes,
        expander_sizes=[20, 28],
        expander_norm=norm,
        variance_weight=[20.0, 15.0],
        covariance_weight=[1.0, 2.0],
        pair_loss=pair_loss,
        image_pair_weight=image_pair_weight,
    )
    return VicRegForPreTraining(config).double().train()


def pairs(views=1, count=12):
    """Images in one view or two, and captions of 2 to 9 tokens, padded."""
    generator = torch.Generator().manual_seed(3)
    shape = (count, 3, 16, 16) if views == 1 else (count, views, 3, 16, 16)
    pixels = torch.randn(shape, generator=generator, dtype=torch.float64)
    lengths = torch.randint(2, 10, (count, 1), generator=generator)
    mask = (torch.arange(9) < lengths).long()
    ids = torch.randint(1, 40, (count, 9), generator=generator) * mask
    return {"pixel_values": pixels, "second_inputs": {"input_ids": ids, "attention_mask": mask}}


def split(batch, count):
    """The same batch in `count` pieces."""
    texts = batch["second_inputs"]
    return [
        {
            "pixel_values": batch["pixel_values"].chunk(count)[index],
            "second_inputs": {name: one.chunk(count)[index] for name, one in texts.items()},
        }
        for index in range(count)
    ]


def gradient(model):
    return torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None])


def main():
    accelerator = Accelerator(cpu=True)
    if accelerator.num_processes != int(sys.argv[1]):
        raise SystemExit(f"expected {sys.argv[1]} processes, got {accelerator.num_processes}")
    results = {"world_size": torch.tensor(accelerator.num_processes)}
    for loss, norm, weight in LOSSES:
        model = build_model(loss, norm, weight)
        share = split(pairs(2 if weight else 1), accelerator.num_processes)[accelerator.process_index]
        pieces = [lambda piece=piece: piece for piece in split(share, 2)]
        outputs = two_pass_backward(model, pieces, accelerator.backward)
        average_gradients(model.parameters())
        results |= {f"{loss}_{weight}_loss": outputs.loss.detach(), f"{loss}_{weight}_gradient": gradient(model)}
    if accelerator.is_main_process:
        save_file(results, sys.argv[2])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
