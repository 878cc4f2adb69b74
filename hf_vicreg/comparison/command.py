"""`hf-vicreg compare`: flags, and what can be refused before torch is imported."""

import argparse
import logging
from pathlib import Path
from typing import Any

from hf_vicreg.training.errors import InputError, log_to_stderr, place_for
from hf_vicreg.training.objectives.registry import ENTRIES, entries_of, refused_objective
from hf_vicreg.training.run.arguments import seconds_of
from hf_vicreg.training.run.places import with_places
from hf_vicreg.training.run.settings import explicit_settings

logger = logging.getLogger(__name__)

# of a recipe; the comparison has its own, or none
LEFT_OUT = (
    *("output_dir", "time_budget", "resume_from_checkpoint", "plan_only", "max_time"),
    *("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo"),
)


def add_compare(verbs: Any) -> None:
    """Add `compare` to the command's sub-parsers."""
    compare = verbs.add_parser(
        "compare",
        help="objectives side by side, each trained for the same time",
        description="Train an encoder by each objective for the same time, on the same images, with the same seeds, "
        "and put what they came to into one table. The same command goes on where it was stopped. Exit code 0: "
        "all runs are finished; 1: some failed; 2: bad input; 75: stopped.",
        epilog="example: hf-vicreg compare my_images --objectives vicreg,simclr --time_budget 15m --seeds 3 "
        "--output_dir runs/comparison",
        allow_abbrev=False,
    )
    compare.add_argument("images", metavar="IMAGES", help="as of `hf-vicreg pretrain`")
    compare.add_argument(
        "--objectives",
        required=True,
        help=f"at least two of {', '.join(ENTRIES)}; commas between, + joins several to one",
    )
    compare.add_argument("--time_budget", required=True, help="of training, of each run: 90s, 15m, 2h")
    compare.add_argument("--seeds", type=int, default=3, help="runs of each objective (default: 3)")
    compare.add_argument("--config", metavar="RECIPE", help="recipe for all of them; what it leaves open is planned")
    compare.add_argument("--output_dir", required=True, type=Path, help="new or empty folder, or the comparison's")
    compare.set_defaults(run=_compare)


def _compare(parsed: argparse.Namespace) -> int:
    log_to_stderr()
    asked = asked_for(
        parsed.images,
        parsed.objectives.split(","),
        time_budget=parsed.time_budget,
        seeds=parsed.seeds,
        config=parsed.config,
        folder=parsed.output_dir,
    )
    from hf_vicreg.comparison.runs import compare

    with place_for("output_dir", parsed.output_dir):
        return compare(asked, parsed.output_dir)


def asked_for(
    images: str, objectives: list[str], *, time_budget: str, seeds: int, config: str | None, folder: Path
) -> dict[str, Any]:
    """Return what a comparison is to be made of, as JSON has it; what an objective does not have is said.

    Args:
        images: As `hf-vicreg pretrain` takes them.
        objectives: Names.
        time_budget: For the training of each run: 90s, 15m, 2h.
        seeds: Runs of each objective; their seeds follow the recipe's.
        config: Recipe.
        folder: Of the comparison.

    Returns:
        `seconds`; `seeds`, a list; `settings`, those of each objective.

    Raises:
        InputError: Bad input.
    """
    names = [one.strip() for one in objectives]
    for name in names:
        if not entries_of(name):
            raise InputError(refused_objective("objectives", name))
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(
            f"`objectives`: expected at least two different ones, with commas between, got {','.join(names)}."
        )
    seconds = seconds_of(time_budget)
    if seeds < 1:
        raise InputError(f"`seeds`: expected at least 1, got {seeds}.")
    settings: dict[str, Any] = {}
    for name in names:
        given = {"data": images, "config": config, "objective": name, "time_budget": time_budget}
        found = explicit_settings(given | {"output_dir": str(folder / name)})
        with_local_images(found)
        if not settings and found.get("push_to_hub"):
            logger.info("the recipe's `push_to_hub` is left out: runs of a comparison are not published")
        settings[name] = {key: one for key, one in found.items() if key not in (*LEFT_OUT, "objective", "seed")}
        settings[name]["objective"] = name
    first = found.get("seed", 0)
    return {"seconds": seconds, "seeds": list(range(first, first + seeds)), "settings": settings}


def with_local_images(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings of runs that are started one after another, as they are.

    Raises:
        InputError: Images that are not there, captions, or a stream.
    """
    if settings.get("caption_column") is not None:
        raise InputError("`caption_column`: expected images alone, got captions; leave it out of the recipe.")
    if settings.get("streaming"):
        raise InputError("`streaming`: expected images that can be counted, got a stream; leave it out.")
    with_places({key: one for key, one in settings.items() if key != "resume_from_checkpoint"})
    return settings
