"""Pretrain an encoder by VICReg: `accelerate launch -m hf_vicreg.training.pretrain --help`.

The same from Python is `hf_vicreg.pretrain(out=..., data=..., model=...)`.
"""

import logging
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel

from hf_vicreg.training.building import begin, build_run, open_run
from hf_vicreg.training.channel_settings import with_measured
from hf_vicreg.training.command import main
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.finishing import finish, fit
from hf_vicreg.training.launch.meeting import refuse
from hf_vicreg.training.planner.plan import configure, drafted, with_stored_plan
from hf_vicreg.training.planner.schedule import seconds_since_start
from hf_vicreg.training.pretrained.text_source import with_text
from hf_vicreg.training.pretrained.warm_start import with_source
from hf_vicreg.training.run.places import with_places
from hf_vicreg.training.run.resolve import resolve
from hf_vicreg.training.run.run_folder import alone_in
from hf_vicreg.training.run.settings import explicit_settings

logger = logging.getLogger("hf_vicreg.training.pretrain")  # by name: launched with -m, this module is __main__


@dataclass
class PretrainResult:
    """What a finished run leaves in memory; of a mere plan, the folder alone.

    Attributes:
        output_dir: The run's folder, loadable by `AutoModel.from_pretrained`.
        encoder: The trained encoder, in evaluation mode; of images with captions, the `VicRegDualEncoder`.
        processor: Its image processor.
        results: What `results.json` holds.
    """

    output_dir: Path
    encoder: PreTrainedModel | None
    processor: BaseImageProcessor | None
    results: dict[str, Any]


def pretrain(
    *,
    out: str | os.PathLike | None = None,
    data: str | os.PathLike,
    model: PreTrainedConfig | dict[str, Any] | None = None,
    config: str | os.PathLike | None = None,
    **run_arguments: Any,
) -> PretrainResult:
    """Pretrain an encoder and return it; the Python form of `accelerate launch -m hf_vicreg.training.pretrain`.

    Args:
        out: Folder of the run; made, or empty, or resumed with `resume_from_checkpoint="latest"`. Default:
            `runs/NAME-DATE`, named after the images.
        data: A folder of image files, a local `datasets` folder, a Hub id, or `"digits"`.
        model: Encoder configuration, or a dictionary of its fields over those of the recipe.
        config: Recipe: a name that comes with the package, or a YAML file.
        run_arguments: Any flag of the command line, and the sections `second_model`, `vicreg` and `views` as
            dictionaries.

    Raises:
        InputError: A `ValueError` whose one line names the field, what was found and what to do.
        RunStopped: The run was asked to stop (SIGTERM, Ctrl-C, a file, `max_time`) and has written a checkpoint.
    """
    given = {"output_dir": out and os.fspath(out), "data": os.fspath(data), "model": model}
    given |= {"config": config and os.fspath(config)} | run_arguments
    try:
        return run_settings(with_places(explicit_settings(given)), time.monotonic())
    except InputError as error:
        refuse(error)  # before the caller's process ends: those of other machines may be waiting for it
        raise


def run_settings(settings: dict[str, Any], began: float | None = None) -> PretrainResult:
    """Run one pretraining from explicit settings; what they leave open is planned.

    Args:
        settings: Of `explicit_settings`, with an `output_dir`.
        began: When that was asked for, by `time.monotonic`; default: when this process began.

    Raises:
        InputError: Bad input; nothing has been overwritten.
        RunStopped: The run was asked to stop and has written a checkpoint.
    """
    began = time.monotonic() - seconds_since_start() if began is None else began
    settings = with_text(with_source(with_stored_plan(settings)))
    config = resolve(drafted(settings))
    opened = open_run(config)
    settings, config = with_measured(settings, config, opened)
    accelerator = opened.accelerator
    planned = configure(settings, config, opened.source, opened.test, accelerator, began=began)
    if config.run.plan_only:
        if accelerator.is_main_process:
            print(planned.table)
        return PretrainResult(opened.folder, None, None, {})
    if planned.table and accelerator.is_main_process:
        logger.info("%s\n", planned.table)
    run = build_run(planned.config, opened)
    with alone_in(run.folder, accelerator):
        begin(run)
        fit(run)
        results = finish(run, began)
    return PretrainResult(run.folder, run.exports[0].model, run.processor, results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], run_settings))
