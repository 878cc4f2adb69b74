"""Images of any channels: their normalisation, measured before anything is planned, and windows that hold nothing."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

from hf_vicreg.training.building import OpenRun
from hf_vicreg.training.images.channels.channel_source import ChannelSource, as_channels
from hf_vicreg.training.images.channels.measuring import measured_views, with_signal
from hf_vicreg.training.images.image_source import ImageSource
from hf_vicreg.training.images.streaming import ImageStream
from hf_vicreg.training.launch.distributed import run_on_main
from hf_vicreg.training.run.config import RunConfig
from hf_vicreg.training.run.resolve import resolve
from hf_vicreg.training.run.run_folder import RECIPE
from hf_vicreg.training.run.settings import read_recipe

logger = logging.getLogger("hf_vicreg.training.pretrain")  # one voice for the whole command

FIELDS = ("channel_low", "channel_high", "image_mean", "image_std")


def with_measured(settings: dict[str, Any], config: RunConfig, opened: OpenRun) -> tuple[dict[str, Any], RunConfig]:
    """Return settings and configuration with the normalisation of the images; every process must call.

    A resumed run has it in its recipe, another run's recipe may give it; else it is measured. In `opened`, windows
    that hold nothing are left out, before the others are measured.

    Raises:
        InputError: Nothing can be measured, or all is blank.
    """
    source = opened.source
    if not (isinstance(source, ChannelSource) or (isinstance(source, ImageStream) and config.reads_channels)):
        return settings, config
    if isinstance(source, ChannelSource):
        opened.source = source = run_on_main(partial(with_signal, source, config), opened.accelerator)
    if config.normalisation_kind != "photo" and config.channel_ranges is None:
        stored = _stored(config)
        if stored is not None:
            settings = settings | {"views": stored | settings.get("views", {})}
        else:
            settings = run_on_main(lambda: measured_views(settings, config, _looked_at(source)), opened.accelerator)
        config = resolve(settings)
        _log(config)
    return settings, config


def _looked_at(source: ImageSource | ImageStream) -> ImageSource:
    """Return what images are measured: all there are, of a stream some."""
    if isinstance(source, ImageSource):
        return source
    assert source.num_channels is not None
    return as_channels(source.sample(), source.num_channels, source.pages)


def _stored(config: RunConfig) -> dict[str, Any] | None:
    """Return what a run to resume has measured."""
    path = Path(config.run.output_dir) / RECIPE
    if config.run.resume_from_checkpoint is None or not path.is_file():
        return None
    views = read_recipe(str(path)).get("views") or {}
    return {key: views[key] for key in FIELDS} if all(views.get(key) is not None for key in FIELDS) else None


def _log(config: RunConfig) -> None:
    assert config.channel_ranges is not None
    for channel, (low, high) in enumerate(zip(*config.channel_ranges, strict=True)):
        logger.info("channel %d: %g becomes 0, %g becomes 1 (%s)", channel, low, high, config.normalisation_kind)
