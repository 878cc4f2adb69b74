"""The methods of pretraining by name, and several at once by their names with `+` between."""

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from .barlow_twins import BarlowTwins
from .byol import BYOL
from .combined_objectives import Combined, refuse_combination
from .masked_objectives import MAE, SimMIM
from .objective import Objective
from .sigreg import SIGReg
from .simclr import SimCLR
from .vicreg_objective import VicReg
from .vicregl import VicRegL

OBJECTIVES: dict[str, type[Objective]] = {
    one.name: one for one in (VicReg, VicRegL, SimCLR, BarlowTwins, SIGReg, BYOL, MAE, SimMIM)
}


def kinds_of(objective: str) -> list[type[Objective]]:
    """Return the methods that an `objective` names: one, or several with `+` between.

    Raises:
        ValueError: No such method.
    """
    names = str(objective).split("+")
    if any(name not in OBJECTIVES for name in names):
        raise ValueError(
            f"`objective`: expected one of {', '.join(OBJECTIVES)}, or several with + between, got {objective!r}."
        )
    return [OBJECTIVES[name] for name in names]


def complete_settings(objective: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return an objective's settings with the defaults of what is not given.

    Of several these are `weights`, 1 by default, and the settings of each under its name.
    """
    kinds = kinds_of(objective)
    if len(kinds) == 1:
        return kinds[0].defaults | given
    weights = {kind.name: 1.0 for kind in kinds} | (given.get("weights") or {})
    own = {kind.name: kind.defaults | (given.get(kind.name) or {}) for kind in kinds if kind.defaults}
    return given | {"weights": weights} | own


def build_objective(config: Any, encoder: nn.Module, expander: nn.Module) -> Objective:
    """Return the objective of a `VicRegConfig`, one method or several; arguments as of `Objective`."""
    kinds = kinds_of(config.objective)
    if len(kinds) == 1:
        return kinds[0](config, encoder, expander)
    settings = complete_settings(config.objective, config.objective_settings or {})
    parts = {kind.name: kind(_of_one(config, kind, settings), encoder, expander) for kind in kinds}
    return Combined(config.objective, parts, settings)


def check_objective(config: Any) -> None:
    """Check a `VicRegConfig`'s objective and its settings, numbers of which may be text as YAML leaves 1e-3.

    Raises:
        ValueError: No such method, methods that do not go together, an unknown setting, one of another type or range,
            or a model they cannot train.
    """
    kinds = kinds_of(config.objective)
    given = dict(config.objective_settings or {})
    if len(kinds) == 1:
        given = _checked(kinds[0], given)
    else:
        refuse_combination(kinds, config)
        given = _checked_sections(kinds, given)
    if config.objective_settings is not None:
        config.objective_settings = given
    for kind, settings, own in _each(config, kinds, given):
        kind.check(settings, own)


def check_views(config: Any, image_size: tuple[int, int]) -> None:
    """Check a `VicRegConfig` against the size of the views it is trained on, which may not be the encoder's own.

    Args:
        config: Checked by itself.
        image_size: Of the views, (height, width) in pixels.

    Raises:
        ValueError: Views that one of its methods cannot learn from.
    """
    for kind, settings, own in _each(config, kinds_of(config.objective), config.objective_settings or {}):
        kind.check_views(settings, own, image_size)


def _each(
    config: Any, kinds: list[type[Objective]], given: dict[str, Any]
) -> Iterator[tuple[type[Objective], dict[str, Any], Any]]:
    """Each method, its complete settings, and the configuration with it alone."""
    complete = complete_settings(config.objective, given)
    for kind in kinds:
        if len(kinds) == 1:
            yield kind, complete, config
        else:
            yield kind, complete.get(kind.name, {}), _of_one(config, kind, complete)


def _checked(kind: type[Objective], settings: dict[str, Any]) -> dict[str, Any]:
    """One method's settings as their defaults' types."""
    for name, value in settings.items():
        if name not in kind.defaults:
            raise ValueError(f"`{name}`: unknown setting of {kind.name}, which has {', '.join(kind.defaults)}.")
        settings[name] = _typed(name, value, kind.defaults[name])
    return settings


def _checked_sections(kinds: list[type[Objective]], given: dict[str, Any]) -> dict[str, Any]:
    """The same of several: their weights, and the settings of each."""
    names = [kind.name for kind in kinds]
    for section, value in given.items():
        if section not in ("weights", *names) or not isinstance(value, dict):
            raise ValueError(
                f"`objective_settings`: expected `weights` and settings of {', '.join(names)}, got {section!r}."
            )
    checked = {kind.name: _checked(kind, dict(given[kind.name])) for kind in kinds if kind.name in given}
    weights = dict(given.get("weights") or {})
    for name, value in weights.items():
        if name not in names:
            raise ValueError(f"`objective_weights`: expected weights of {', '.join(names)}, got one of {name!r}.")
        weights[name] = _typed(f"objective_weights.{name}", value, 1.0)
        if not weights[name] >= 0:
            raise ValueError(f"`objective_weights.{name}`: expected at least 0, got {value}.")
    if not any(weights.get(name, 1.0) for name in names):
        raise ValueError("`objective_weights`: expected one above 0 at least, got none.")
    return checked | ({"weights": weights} if "weights" in given else {})


def _of_one(config: Any, kind: type[Objective], settings: dict[str, Any]) -> Any:
    """The configuration with one of several methods alone, around the same encoder."""
    own = copy.copy(config)
    own.objective, own.objective_settings = kind.name, settings.get(kind.name)
    return own


def _typed(name: str, value: Any, default: Any) -> Any:
    """Return a value as its default's type."""
    try:
        if isinstance(default, list):
            return [_typed(name, one, 0) for one in value if not isinstance(value, str)]
        number = float(value)
        if isinstance(value, bool) or (isinstance(default, int) and int(number) != number):
            raise ValueError
        return int(number) if isinstance(default, int) else number
    except (TypeError, ValueError, OverflowError):
        kinds = {list: "a list of whole numbers", int: "a whole number", float: "a number"}
        raise ValueError(f"`{name}`: expected {kinds[type(default)]}, got {value!r}.") from None


__all__ = ["OBJECTIVES", "build_objective", "check_objective", "check_views", "complete_settings", "kinds_of"]
