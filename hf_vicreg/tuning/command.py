"""`hf-vicreg tune`: flags, and what can be refused before torch is imported."""

import argparse
import math
from pathlib import Path
from typing import Any

from hf_vicreg.comparison.command import LEFT_OUT, with_local_images
from hf_vicreg.training.errors import InputError, hint, log_to_stderr, place_for
from hf_vicreg.training.objectives.registry import ENTRIES
from hf_vicreg.training.run.arguments import seconds_of
from hf_vicreg.training.run.settings import explicit_settings

# `auto`: k-NN where there are labels
JUDGES = ("auto", "knn", "rankme", "lidar", "effective_rank", "alignment_uniformity")


def add_tune(verbs: Any) -> None:
    """Add `tune` to the command's sub-parsers."""
    tune = verbs.add_parser(
        "tune",
        help="learning rate, weights of the loss and crops by successive halving",
        description="Train short runs with drawn settings, then the better half of them anew for longer, until two "
        "are compared, and write the best one's recipe. The same command goes on where it was stopped. Exit code 0: "
        "there is a recipe; 1: every run failed; 2: bad input; 75: stopped.",
        epilog="example: hf-vicreg tune my_images --time_budget 2h --output_dir runs/tuning",
        allow_abbrev=False,
    )
    tune.add_argument("images", metavar="IMAGES", help="as of `hf-vicreg pretrain`")
    tune.add_argument("--time_budget", required=True, help="of all runs together: 15m, 2h, 1d")
    tune.add_argument("--config", metavar="RECIPE", help="recipe for all of them; what it leaves open is planned")
    tune.add_argument("--objective", help=f"default: the recipe's, or vicreg; one of {', '.join(ENTRIES)}, or a sum")
    tune.add_argument("--trials", type=int, default=8, help="settings to begin with (default: 8)")
    tune.add_argument("--judge", default="auto", help=f"{', '.join(JUDGES)} (default: auto)")
    tune.add_argument(
        "--search",
        metavar="KEY=LOW..HIGH",
        nargs="+",
        default=[],
        help="numbers to tune instead; default: learning_rate, views.crop_min_ratio and the objective's own weight",
    )
    tune.add_argument("--output_dir", required=True, type=Path, help="new or empty folder, or the tuning's")
    tune.set_defaults(run=_tune)


def _tune(parsed: argparse.Namespace) -> int:
    log_to_stderr()
    asked = asked_for(
        parsed.images,
        time_budget=parsed.time_budget,
        config=parsed.config,
        objective=parsed.objective,
        trials=parsed.trials,
        judge=parsed.judge,
        search=parsed.search,
        folder=parsed.output_dir,
    )
    from hf_vicreg.tuning.runs import tune

    with place_for("output_dir", parsed.output_dir):
        return tune(asked, parsed.output_dir)


def asked_for(
    images: str,
    *,
    time_budget: str,
    config: str | None,
    objective: str | None,
    trials: int,
    judge: str,
    search: list[str],
    folder: Path,
) -> dict[str, Any]:
    """Return what a tuning is to be made of, as JSON has it.

    Args:
        images: As `hf-vicreg pretrain` takes them.
        time_budget: For all trials together: 15m, 2h, 1d.
        config: Recipe.
        objective: Of all trials; None: the recipe's.
        trials: Settings to begin with.
        judge: One of `JUDGES`.
        search: `KEY=LOW..HIGH` of each number to tune; none: those that are worth it.
        folder: Of the tuning.

    Returns:
        `seconds`, `trials`, `judge`, `seed`, `search` by key, and `settings`, those of the objective by its name.

    Raises:
        InputError: Bad input.
    """
    seconds = seconds_of(time_budget)
    if not 2 <= trials <= 1000:
        raise InputError(f"`trials`: expected 2 to 1000, got {trials}.")
    if judge not in JUDGES:
        raise InputError(f"`judge`: expected one of {', '.join(JUDGES)}, got {judge!r}{hint(judge, list(JUDGES))}")
    ranges = dict(_range_of(one) for one in search)
    given = {"data": images, "config": config, "objective": objective, "time_budget": time_budget}
    given |= {"output_dir": str(folder / "trial")}
    found = with_local_images(explicit_settings(given))
    for end in (0, 1):  # the ends are values that a run takes, as far as that is known here
        ends = {key: (low, high)[end] for key, (low, high) in ranges.items()}
        taken = explicit_settings(with_values({key: one for key, one in found.items() if key != "time_budget"}, ends))
        whole = next((key for key in ends if isinstance(taken.get(key), int)), None)
        if whole is not None:
            raise InputError(f"`search`: expected a number that may have a fraction, got {whole}; leave it out.")
    name = found.get("objective", "vicreg")
    settings = {key: one for key, one in found.items() if key not in (*LEFT_OUT, "objective", "seed")}
    settings.setdefault("linear_probe", False)
    return {
        "seconds": seconds,
        "trials": trials,
        "judge": judge,
        "seed": found.get("seed", 0),
        "search": {key: list(ends) for key, ends in ranges.items()},
        "settings": {name: settings | {"objective": name}},
    }


def with_values(settings: dict[str, Any], values: dict[str, float]) -> dict[str, Any]:
    """Return settings with some of their numbers replaced, by keys such as `learning_rate` or `vicreg.gamma`."""
    changed = {key: dict(one) if isinstance(one, dict) else one for key, one in settings.items()}
    for key, value in values.items():
        section, dot, name = key.partition(".")
        if dot:
            changed.setdefault(section, {})[name] = value
        else:
            changed[key] = value
    return changed


def _range_of(text: str) -> tuple[str, tuple[float, float]]:
    """Return the key and the ends of `KEY=LOW..HIGH`."""
    key, _, ends = text.partition("=")
    low, _, high = ends.partition("..")
    try:
        found = float(low), float(high)
        if not (key and -math.inf < found[0] < found[1] < math.inf):
            raise ValueError
    except ValueError:
        raise InputError(f"`search`: expected KEY=LOW..HIGH, as learning_rate=1e-4..1e-2, got {text!r}.") from None
    return key, found
