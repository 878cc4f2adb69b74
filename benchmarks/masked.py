"""A masked autoencoder's forward and backward pass at 75% masked tiles against the encoder's on full images.

The encoder alone on the full image is the baseline, with the mean of its pooled output as a loss; the autoencoder's
time includes its decoder, its loss and the pattern of a mask that was never seen before. Turns alternate, medians of
images a second, and the median of ratios of the same turn. One line of JSON each size.

    python -m benchmarks.masked --patches 1024 4096 --out masked.json
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

import torch

from benchmarks.measuring import machine, step
from hf_vicreg import BigBirdViTConfig, BigBirdViTMAEConfig, BigBirdViTMAEForPreTraining


def build(arguments: argparse.Namespace, num_patches: int) -> BigBirdViTMAEForPreTraining:
    """Return a masked autoencoder for square images of so many patches."""
    torch.manual_seed(0)
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise SystemExit(f"`--patches`: expected squares, got {num_patches}.")
    encoder = BigBirdViTConfig(
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=arguments.hidden_size // 64,
        intermediate_size=4 * arguments.hidden_size,
        image_size=side * arguments.patch_size,
        patch_size=arguments.patch_size,
        tile_size=arguments.tile_size,
        attention_type=arguments.attention_type,
    )
    config = BigBirdViTMAEConfig(encoder=encoder, mask_ratio=arguments.mask_ratio)
    model = BigBirdViTMAEForPreTraining(config).to(arguments.device).train()
    model.set_attn_implementation(arguments.attn_implementation)
    return model


def measure(arguments: argparse.Namespace, num_patches: int) -> dict:
    """Return images a second of both, and how many times as many the autoencoder has."""
    model = build(arguments, num_patches)
    batch, device = arguments.batch_size, arguments.device
    size = model.config.encoder.image_size
    images = torch.randn(batch, 3, size, size, device=device)
    keys = iter(range(10**6))

    def full() -> torch.Tensor:
        return model.encoder(images).pooler_output.float().mean()

    def masked() -> torch.Tensor:
        mask = model.draw_mask(size, size, f"benchmark/{next(keys)}").expand(batch, -1)
        return model(images, bool_masked_pos=mask).loss

    seconds: dict[str, list[float]] = {"full": [], "masked": []}
    autocast = torch.autocast(device, torch.bfloat16, enabled=arguments.bf16)
    for _ in range(arguments.repeats + arguments.warm_up):
        for name, function in (("full", full), ("masked", masked)):
            with autocast:
                seconds[name].append(step(function, device)[1])
            model.zero_grad(set_to_none=True)
    kept = {name: own[arguments.warm_up :] for name, own in seconds.items()}
    ratios = [one / other for one, other in zip(kept["full"], kept["masked"], strict=True)]
    return {
        "patches": num_patches,
        "batch_size": batch,
        "visible": round(num_patches - int(model.draw_mask(size, size, "0").sum())),
        **{f"{name}_images_a_second": round(batch / statistics.median(own), 2) for name, own in kept.items()},
        "times": round(statistics.median(ratios), 2),
        "times_lowest": round(min(ratios), 2),
        "times_highest": round(max(ratios), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--patches", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--mask_ratio", type=float, default=0.75)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm_up", type=int, default=1, help="turns that are not counted")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--num_hidden_layers", type=int, default=12)
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--tile_size", type=int, default=4)
    parser.add_argument("--attention_type", choices=("block_sparse", "original_full"), default="block_sparse")
    parser.add_argument("--attn_implementation", choices=("eager", "sdpa", "flex_attention"), default="sdpa")
    parser.add_argument("--bf16", action="store_true", help="under autocast")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    rows = []
    for num_patches in arguments.patches:
        rows.append(measure(arguments, num_patches))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        record = {
            "command": "python -m benchmarks.masked " + " ".join(sys.argv[1:]),
            "machine": machine(arguments.device),
            "rows": rows,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
