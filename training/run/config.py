"""What a run is made of, resolved: its flags, its views, its encoders."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hf_vicreg.modeling.configuration_vicreg import VicRegConfig
from hf_vicreg.training.objectives.combined import WEIGHTS
from hf_vicreg.training.objectives.entry import ObjectiveEntry
from hf_vicreg.training.objectives.registry import entry_of
from hf_vicreg.training.run.arguments import RESERVED, PretrainArguments, ViewsConfig
from hf_vicreg.training.run.section_flags import VICREG_WEIGHTS


@dataclass
class RunConfig:
    """Everything a run is made of."""

    run: PretrainArguments
    views: ViewsConfig
    vicreg: VicRegConfig  # holds the encoder's configuration

    @property
    def image_size(self) -> tuple[int, int]:
        """Size of the views, (height, width) in pixels: given, or the encoder's; 224 for encoders that name none."""
        size = self.views.image_size or getattr(self.vicreg.encoder, "image_size", None) or 224
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def used_image_size(self) -> tuple[int, int]:
        """Size of the images that the finished encoder is used with, of its processor and of k-NN during the run.

        The encoder's own where it has one: `model.image_size` may differ from that of the views.
        """
        size = getattr(self.vicreg.encoder, "image_size", None) or self.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def normalisation(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of each channel by which pixels in [0, 1] are normalised: given, or ImageNet's."""
        given, channels = (self.views.image_mean, self.views.image_std), self.num_channels
        # other channels than three are measured before anything is trained
        defaults = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if channels == 3 else ([0.5] * channels,) * 2
        mean, std = (
            list(default) if one is None else [one] * channels if isinstance(one, float) else list(one)
            for one, default in zip(given, defaults, strict=True)
        )
        return mean, std

    @property
    def num_channels(self) -> int:
        """Channels of the images, as the encoder takes them."""
        return getattr(self.vicreg.encoder, "num_channels", None) or 3

    @property
    def normalisation_kind(self) -> str:
        """How values become 0 to 1: `photo`, `percentile`, `minmax` or `fixed`."""
        given = self.run.normalisation
        return given[0].split()[0] if given else "photo" if self.num_channels == 3 else "percentile"

    @property
    def reads_channels(self) -> bool:
        """Whether images are read with all their channels and depth, or by windows, not as Pillow's RGB."""
        run = self.run
        return self.normalisation_kind != "photo" or run.window is not None or run.pages is not None

    @property
    def channel_ranges(self) -> tuple[list[float], list[float]] | None:
        """Values of each channel that become 0 and 1; None for photographs, and before they are measured."""
        low, high = (
            None if one is None else [one] * self.num_channels if isinstance(one, float) else list(one)
            for one in (self.views.channel_low, self.views.channel_high)
        )
        return None if low is None or high is None else (low, high)

    @property
    def entry(self) -> ObjectiveEntry:
        """What is said of what is learned: of the objective, or of a loss of pairs in its place."""
        return entry_of({"objective": self.run.objective, "vicreg": {"pair_loss": self.vicreg.pair_loss}})

    @property
    def views_beside_captions(self) -> int:
        """Views of each image where captions are the other branch's."""
        return 2 if self.vicreg.image_pair_weight else 1

    @property
    def step_size(self) -> int:
        """Images a step over all processes: the batch of the loss."""
        return self.run.statistics_batch_size or self.run.batch_size

    def to_recipe(self) -> dict[str, Any]:
        """Return the plain, complete dictionary that `recipe.yaml` stores and `--config` reads again."""
        bookkeeping = {"transformers_version", "architectures", "auto_map", *RESERVED}
        model, second, vicreg = (
            {name: value for name, value in config.to_diff_dict().items() if name not in bookkeeping} if config else {}
            for config in (self.vicreg.encoder, self.vicreg.second_encoder, self.vicreg)
        )
        del vicreg["model_type"]
        if not entry_of({"objective": self.run.objective}).vicreg_weights:
            vicreg = {name: value for name, value in vicreg.items() if name not in VICREG_WEIGHTS}
        run = dataclasses.asdict(self.run) | {"resume_from_checkpoint": None}  # to read it again is to begin anew
        return run | {
            "model": _plain(model),
            **({"second_model": _plain(second)} if second else {}),
            "vicreg": _plain(vicreg),
            "views": _plain(dataclasses.asdict(self.views)),
            **_plain(self._objective_sections()),
        }

    def _objective_sections(self) -> dict[str, Any]:
        """The settings of the objective, or of several and their weights, by their sections."""
        settings, name = self.vicreg.objective_settings or {}, self.run.objective
        if "+" not in name:
            return {name: settings} if settings else {}
        return {WEIGHTS if key == "weights" else key: one for key, one in settings.items()}


def _plain(value: Any) -> Any:
    """Tuples as lists, so that YAML and JSON give back what was stored."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
