"""What the runs of a comparison are made of: one encoder for all, and as many steps for each as its time holds.

`python -m hf_vicreg.comparison.planning ASKED PLANS`, two JSON files: a process of its own, so that the one that
starts the runs takes nothing of their device.
"""

import copy
import json
import logging
import sys
from pathlib import Path
from typing import Any

from hf_vicreg.training.building import open_run
from hf_vicreg.training.channel_settings import with_measured
from hf_vicreg.training.errors import InputError, log_to_stderr, tell
from hf_vicreg.training.images.image_source import ImageSource
from hf_vicreg.training.objectives.registry import entry_of
from hf_vicreg.training.planner.choices import USED_SIZE, choose_schedule
from hf_vicreg.training.planner.machine import this_machine
from hf_vicreg.training.planner.plan import choose_and_try, drafted, survey
from hf_vicreg.training.planner.schedule import words
from hf_vicreg.training.pretrained.warm_start import with_source
from hf_vicreg.training.run.arguments import bytes_of
from hf_vicreg.training.run.resolve import resolve

logger = logging.getLogger("hf_vicreg.comparison.planning")

# what one plan decides for all
SHARED = ("model", "views", "batch_size", "statistics_batch_size", "learning_rate", "dataloader_num_workers")


def plan_comparison(asked: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the plan of each objective, by name, after trying a few of its steps.

    The encoder, the views, the batch and the learning rate are the same for all. The expander and the weights of a
    loss are each objective's own.

    Args:
        asked: Of `asked_for`.
        folder: Of the comparison; nothing is written.

    Returns:
        Of each objective `recipe`, whole but for seed and folder; `steps`; `step_seconds`, the mean, and `peak_memory`
        in bytes, of the steps that were tried; `steps_per_epoch`; `labelled`, whether there are images for a k-NN;
        `chooses_used_size`, whether the size of use was chosen by the crops.

    Raises:
        InputError: What one of the runs would refuse, or less time than one pass over the images takes.
    """
    settings = {
        name: with_source(one | {"output_dir": str(Path(folder) / name)}) for name, one in asked["settings"].items()
    }
    if len(settings) > 1:  # one learning rate suits all objectives only with expanders at the same
        settings = {name: {"expander_lr_scale": 1.0} | one for name, one in settings.items()}
    configs = {name: resolve(drafted(one)) for name, one in settings.items()}
    # an encoder whose patches may not overlap serves all
    leader = next((name for name, one in settings.items() if entry_of(one).whole_patches), next(iter(settings)))
    opened = open_run(configs[leader])
    accelerator = opened.accelerator
    settings[leader], config = with_measured(settings[leader], configs[leader], opened)
    source, held_out = opened.source, opened.test
    assert isinstance(source, ImageSource)
    memory = config.run.max_memory
    machine = this_machine(
        accelerator.device, max_memory=bytes_of(memory) if memory else None, num_processes=1, local_processes=1
    )
    images = survey(source, held_out)
    plans: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for name in (leader, *(one for one in settings if one != leader)):
        given = settings[name] | copy.deepcopy(shared)
        if shared:
            resolve(drafted(given))  # its own objections come before those of a trial
        logger.info("%s:", name)
        made, config, _, trial = choose_and_try(given, source, images, accelerator, machine, asked["seconds"])
        if not shared:
            shared = {key: made.settings[key] for key in SHARED if key in made.settings}
        step, per_epoch = trial.mean_step_seconds, max(1, images.count // config.step_size)
        steps = int(asked["seconds"] / step)
        if steps < per_epoch:
            raise InputError(
                f"`time_budget`: expected time for one pass over the images at least, {words(per_epoch * step)} for "
                f"{name!r}, got {words(asked['seconds'])}; raise it, or set `max_train_samples` in the recipe."
            )
        choose_schedule(made, steps, per_epoch, step, 0.0)
        if images.labelled:
            made.settings.setdefault("linear_probe", True)
        made.settings.setdefault(
            "knn_every_epochs", 0
        )  # at the ends: what comes between takes time, though not theirs
        planned = resolve(made.settings | {"per_device_train_batch_size": None})
        recipe = planned.to_recipe()
        recipe["batch_size"], recipe["statistics_batch_size"] = config.run.batch_size, config.run.statistics_batch_size
        for key in ("output_dir", "seed"):
            del recipe[key]
        logger.info("%s: %d steps of %.3g s", name, steps, step)
        plans[name] = {
            "recipe": recipe,
            "steps": steps,
            "step_seconds": step,
            "peak_memory": trial.rate.peak_memory,
            "steps_per_epoch": per_epoch,
            "labelled": images.labelled,
            "chooses_used_size": made.reasons.get("model.image_size") == USED_SIZE,
        }
    return {name: plans[name] for name in settings}


def main(arguments: list[str]) -> int:
    """Plan from one file into another; return the exit code."""
    log_to_stderr()
    asked, plans = map(Path, arguments)
    given = json.loads(asked.read_text())
    try:
        plans.write_text(json.dumps(plan_comparison(given["asked"], given["folder"])))
    except InputError as error:
        tell(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
