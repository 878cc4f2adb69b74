"""What an encoder is worth, told without labels, on the same views of the same images for all encoders.

`python -m hf_vicreg.tuning.judging RECIPE RUN`: the recipe says which images and views, and writes into the run's
folder; a process of its own, so that the one that starts the runs takes nothing of their device.
"""

import json
import sys
from pathlib import Path

import torch

from hf_vicreg.comparison.trials import LABEL_FREE, write
from hf_vicreg.modeling.encoder_outputs import encoder_outputs, pooled_features
from hf_vicreg.modeling.modeling_vicreg import load_encoder
from hf_vicreg.training.errors import InputError, log_to_stderr, room_in, tell
from hf_vicreg.training.images.colour import finish_views
from hf_vicreg.training.images.image_source import ImageSource
from hf_vicreg.training.images.order import view_rng
from hf_vicreg.training.images.run_images import load_images, usable_images
from hf_vicreg.training.images.views import ViewSampler
from hf_vicreg.training.launch.distributed import build_accelerator
from hf_vicreg.training.monitor.label_free import label_free_figures
from hf_vicreg.training.run.config import RunConfig
from hf_vicreg.training.run.resolve import resolve

NUM_IMAGES, NUM_VIEWS = 512, 8


def views_of(config: RunConfig) -> torch.Tensor:
    """Return views `(images, views, channels, height, width)` of some images of a run, normalised.

    Raises:
        InputError: Fewer than two images that can be read.
    """
    source, _, _ = load_images(config)
    assert isinstance(source, ImageSource)
    source = usable_images(source, config)
    samplers = ViewSampler.of_views(config.views, config.image_size)[:2]
    found = []
    for at in range(min(NUM_IMAGES, len(source))):
        index = at * len(source) // min(NUM_IMAGES, len(source))
        image = source.read(index)
        if image is None:
            continue
        drawn = [
            samplers[view % 2](image, view_rng(f"label-free/{index}/{view}", samplers[view % 2]))
            for view in range(NUM_VIEWS)
        ]
        crops, colours = zip(*drawn, strict=True)
        views = finish_views(torch.stack(crops), torch.tensor(colours), config.normalisation, config.channel_ranges)
        found.append(views)
    if len(found) < 2:
        raise InputError(f"`data`: expected at least two images that can be read, found {len(found)}.")
    return torch.stack(found)


@torch.no_grad()
def judge(config: RunConfig, run: Path) -> dict[str, float]:
    """Return the figures of `label_free_figures` of the encoder in a run's folder, on views of a configuration."""
    device = build_accelerator("no", device=config.run.device).device
    encoder = load_encoder(run).to(device).eval()
    outputs = (encoder_outputs(encoder, {"pixel_values": views.to(device)}) for views in views_of(config))
    return label_free_figures(torch.stack([pooled_features(one).cpu() for one in outputs]))


def main(arguments: list[str]) -> int:
    """Write what a run is worth into its folder; return the exit code."""
    log_to_stderr()
    recipe, run = map(Path, arguments)
    try:
        figures = judge(resolve({"config": str(recipe), "output_dir": str(run)}), run)
        with room_in(run):
            write(run / LABEL_FREE, json.dumps(figures) + "\n")
    except InputError as error:
        tell(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
