"""Images a second of `hf-vicreg embed`, against the model's forward pass alone on images decoded before.

    python -m benchmarks.embed DATASET --image_size 64 --num_images 2000

Both on the same images in the same batches, a turn each, so that a slow minute hits both; medians of seconds, and of
ratios in the same turn. `embed` reads, decodes, preprocesses, encodes and writes shards; loading the model and the
data set is in neither. On a CPU also CPU seconds, which a busy machine disturbs least: those of the forward pass with
one thread as a share of all that `embed` takes. Prints JSON.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.measuring import machine
from hf_vicreg import BigBirdViTConfig, BigBirdViTImageProcessor, BigBirdViTModel
from hf_vicreg.training.evaluation.encoder import VisionEncoder, load_vision_encoder
from hf_vicreg.training.evaluation.features import pixels_of
from hf_vicreg.training.images.image_source import ImageSource
from hf_vicreg.training.launch.distributed import set_threads
from hf_vicreg.training.prepare.arguments import EmbedArguments, embed_arguments
from hf_vicreg.training.prepare.embed import IMAGES_A_SHARD, load_images
from hf_vicreg.training.prepare.embedding_batches import embedded_batches, form_of
from hf_vicreg.training.prepare.embedding_shards import ShardRows, write_shard

DECODED_BATCHES = 8  # kept as pixels; the forward pass takes them in turn


def new_model(folder: Path, arguments: argparse.Namespace) -> str:
    """Save an untrained BigBirdViT of the size asked for and return its folder."""
    side = arguments.image_size
    config = BigBirdViTConfig(
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=arguments.hidden_size // 64,
        intermediate_size=4 * arguments.hidden_size,
        image_size=side,
        patch_size=arguments.patch_size,
        tile_size=2,
    )
    BigBirdViTModel(config).save_pretrained(folder)
    BigBirdViTImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    return str(folder)


def seconds_of_forward(encoder: VisionEncoder, decoded: list[torch.Tensor], num_batches: int) -> float:
    """Return seconds of the model on decoded batches, with all threads of this process."""
    started = time.perf_counter()
    for turn in range(num_batches):
        features = encoder(decoded[turn % len(decoded)])
    features.cpu()
    return time.perf_counter() - started


def seconds_of_embed(
    source: ImageSource, encoder: VisionEncoder, folder: Path, batch_size: int, workers: int
) -> float:
    """Return seconds from images to shards."""
    form = form_of(encoder, EmbedArguments())
    shards = [
        range(start, min(start + IMAGES_A_SHARD, len(source))) for start in range(0, len(source), IMAGES_A_SHARD)
    ]
    batches = [shard[start : start + batch_size] for shard in shards for start in range(0, len(shard), batch_size)]
    started = time.perf_counter()
    embedded = embedded_batches(source, encoder, form, batches, batch_size=batch_size, num_workers=workers)
    for number, shard in enumerate(shards):
        rows = ShardRows(source, form, len(shard))
        while len(rows.digests) < len(shard):
            rows.add(next(embedded))
        write_shard(folder / f"{number}.parquet", rows)
    embedded.close()
    return time.perf_counter() - started


def cpu_seconds() -> float:
    """Return CPU seconds so far of this process and of those it has waited for."""
    return sum(os.times()[:4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", help="as of `hf-vicreg embed`")
    parser.add_argument("--model", help="folder or Hub id; default: an untrained one of the size below")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--num_hidden_layers", type=int, default=12)
    parser.add_argument("--num_images", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--workers", type=int, help="loader processes; default: the cores at hand")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    threads, size = set_threads(1), arguments.batch_size
    workers = threads if arguments.workers is None else arguments.workers
    source = load_images(arguments.images, embed_arguments({})).first(arguments.num_images)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        encoder = load_vision_encoder(arguments.model or new_model(folder / "model", arguments))
        firsts = [range(start, start + size) for start in range(0, len(source), size)][:DECODED_BATCHES]
        decoded = [
            pixels_of(
                [image for index in one if index < len(source) and (image := source.read(index))],
                encoder.processor,
                size,
            )
            for one in firsts
        ]
        num_batches = -(-len(source) // size)
        seconds_of_forward(encoder, decoded, 1)
        turns = [
            (
                seconds_of_forward(encoder, decoded, num_batches),
                seconds_of_embed(source, encoder, folder, size, workers),
            )
            for _ in range(arguments.repeats)
        ]
        torch.set_num_threads(1)
        before = cpu_seconds()
        seconds_of_forward(encoder, decoded, num_batches)
        between = cpu_seconds()
        seconds_of_embed(source, encoder, folder, size, workers)
        share = (between - before) / (cpu_seconds() - between)
    forward, embed = (statistics.median(column) for column in zip(*turns, strict=True))
    result = {
        "command": "python -m benchmarks.embed " + " ".join(sys.argv[1:]),
        "machine": machine(encoder.model.device.type),
        "images": len(source),
        "forward_images_a_second": round(len(source) / forward, 1),
        "embed_images_a_second": round(len(source) / embed, 1),
        "embed_over_forward_speed": round(statistics.median(one / other for one, other in turns), 3),
        "ratios": [round(one / other, 3) for one, other in turns],
        "workers": workers,
        "forward_share_of_cpu_seconds": round(share, 3) if encoder.model.device.type == "cpu" else None,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
