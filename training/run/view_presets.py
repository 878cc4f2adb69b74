"""`views.preset`: augmentations by name, each the fields of `ViewsConfig` that differ from its defaults."""

from typing import Any

# No colours to jitter: what differs between two exposures of one sample is drawn by channel.
_MEASURED = {"jitter_probability": 0.0, "grayscale_probability": 0.0, "solarize_probability": 0.0}
_ANY_WAY_UP = {"flip_probability": 0.5, "vertical_flip_probability": 0.5, "quarter_turn_probability": 0.75}

# The first two differ as the paper and its code do (facebookresearch/vicreg, augmentations.py).
_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"blur_probability": 0.5, "solarize_probability": 0.1},
    "official": {"blur_probability": (1.0, 0.1), "solarize_probability": (0.0, 0.2)},
    "photo": {"blur_probability": 0.5, "solarize_probability": 0.1},
    "microscopy": _MEASURED
    | _ANY_WAY_UP
    | {"crop_min_ratio": 0.2, "gain": 0.3, "offset": 0.05, "gamma": 0.3, "noise": 0.03, "blur_probability": 0.3}
    | {"channel_dropout_probability": 0.1},
    "pathology": _MEASURED
    | _ANY_WAY_UP
    | {"crop_min_ratio": 0.2, "stain": 0.15, "gain": 0.05, "offset": 0.03, "noise": 0.02, "blur_probability": 0.3},
    "satellite": _MEASURED
    | _ANY_WAY_UP
    | {"crop_min_ratio": 0.2, "gain": 0.2, "offset": 0.05, "gamma": 0.2, "noise": 0.02, "blur_probability": 0.2}
    | {"channel_dropout_probability": 0.1},
    # sides and poles of a body mean something: nothing is flipped, turns are those of how a patient lies
    "medical": _MEASURED
    | {"flip_probability": 0.0, "rotation_degrees": 10.0, "crop_min_ratio": 0.3, "gain": 0.2, "offset": 0.1}
    | {"gamma": 0.3, "noise": 0.03, "blur_probability": 0.3},
}
# A preset leaves nothing of another one's operations by channel, in a recipe below it.
_OFF = dict.fromkeys(("vertical_flip_probability", "quarter_turn_probability", "channel_dropout_probability"), 0.0)
_OFF |= dict.fromkeys(("gain", "offset", "gamma", "noise", "stain"), 0.0)
VIEW_PRESETS = {name: _OFF | preset for name, preset in _PRESETS.items()}
