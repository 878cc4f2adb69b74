"""The methods of pretraining by name."""

from typing import Any

from .barlow_twins import BarlowTwins
from .byol import BYOL
from .masked_objectives import MAE, SimMIM
from .objective import Objective
from .sigreg import SIGReg
from .simclr import SimCLR
from .vicreg_objective import VicReg
from .vicregl import VicRegL

OBJECTIVES: dict[str, type[Objective]] = {
    one.name: one for one in (VicReg, VicRegL, SimCLR, BarlowTwins, SIGReg, BYOL, MAE, SimMIM)
}


def check_objective(config: Any) -> None:
    """Check a `VicRegConfig`'s objective and its settings, numbers of which may be text as YAML leaves 1e-3.

    Raises:
        ValueError: No such method, an unknown setting, one of another type or range, or a model it cannot train.
    """
    kind = OBJECTIVES.get(config.objective)
    if kind is None:
        raise ValueError(f"`objective`: expected one of {', '.join(OBJECTIVES)}, got {config.objective!r}.")
    settings = dict(config.objective_settings or {})
    for name, value in settings.items():
        if name not in kind.defaults:
            raise ValueError(f"`{name}`: unknown setting of {kind.name}, which has {', '.join(kind.defaults)}.")
        settings[name] = _typed(name, value, kind.defaults[name])
    if config.objective_settings is not None:
        config.objective_settings = settings
    kind.check(kind.defaults | settings, config)


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


__all__ = ["OBJECTIVES", "check_objective"]
