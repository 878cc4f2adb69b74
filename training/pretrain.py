"""Pretrain an encoder by VICReg: `accelerate launch -m hf_vicreg.training.pretrain --help`.

The same from Python is `hf_vicreg.pretrain(out=..., data=..., model=...)`.
"""

import logging
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel

from hf_vicreg.modeling.modeling_bigbird_vit import BigBirdViTModel
from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.modeling.vicreg_statistics import covariance_form
from hf_vicreg.training.command import main
from hf_vicreg.training.engine.checkpoint import RunState
from hf_vicreg.training.engine.loop import Trainer
from hf_vicreg.training.engine.resume import checkpoint_to_resume
from hf_vicreg.training.errors import InputError, RunStopped, as_input_error, room_in
from hf_vicreg.training.evaluation.online_probe import OnlineProbe
from hf_vicreg.training.export import export_run, export_snapshot
from hf_vicreg.training.hub_push import HubPush, check_account
from hf_vicreg.training.images.run_images import load_images, usable_images
from hf_vicreg.training.images.sources import ImageSource
from hf_vicreg.training.images.unusable import write_unusable
from hf_vicreg.training.launch.distributed import build_accelerator, check_device, run_on_main
from hf_vicreg.training.launch.signals import StopRequest
from hf_vicreg.training.monitor.curves import CURVES_FILE, draw_curves, with_ends
from hf_vicreg.training.monitor.doctor import health_of
from hf_vicreg.training.monitor.run_log import LOG_FILE, read_log
from hf_vicreg.training.monitor.summary import summary
from hf_vicreg.training.monitor.tracking import TRACKERS_FOLDER, finish_trackers, start_trackers, tracker_names
from hf_vicreg.training.planner.plan import configure, with_stored_plan
from hf_vicreg.training.planner.schedule import seconds_since_start
from hf_vicreg.training.run.config import RunConfig
from hf_vicreg.training.run.places import with_places
from hf_vicreg.training.run.processors import build_processor
from hf_vicreg.training.run.resolve import resolve
from hf_vicreg.training.run.run_folder import RECIPE, refuse_foreign_folder, start_folder
from hf_vicreg.training.run.settings import explicit_settings

logger = logging.getLogger("hf_vicreg.training.pretrain")  # by name: launched with -m, this module is __main__


@dataclass
class PretrainResult:
    """What a finished run leaves in memory; of a mere plan, the folder alone.

    Attributes:
        output_dir: The run's folder, loadable by `AutoModel.from_pretrained`.
        encoder: The trained encoder, in evaluation mode.
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
    return run_settings(with_places(explicit_settings(given)), time.monotonic())


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
    settings = with_stored_plan(settings)
    config = resolve(settings)
    run = config.run
    check_device(run.device)
    folder = Path(run.output_dir)
    stop = StopRequest(folder, run.max_time)
    refuse_foreign_folder(folder, RECIPE, resuming=run.resume_from_checkpoint is not None)
    trackers = tracker_names(run.report_to) if run.with_tracking else []
    logger.info("reading what images there are in %s", run.train_dir or run.dataset_name)
    source, bank, test = load_images(config)
    accelerator = build_accelerator(
        run.mixed_precision,
        device=run.device,
        log_with=trackers,
        project_dir=folder / TRACKERS_FOLDER,
    )
    push = None
    if run.push_to_hub:
        repo = run.hub_model_id or ""
        run_on_main(lambda: check_account(repo), accelerator)
        push = HubPush(folder, repo, private=run.hub_private_repo) if accelerator.is_main_process else None
    planned = configure(settings, config, source, test, accelerator, began=began)
    if run.plan_only:
        if accelerator.is_main_process:
            print(planned.table)
        return PretrainResult(folder, None, None, {})
    config, run = planned.config, planned.config.run
    if planned.table and accelerator.is_main_process:
        logger.info("%s\n", planned.table)
    source = usable_images(source, config) if isinstance(source, ImageSource) else source
    set_seed(run.seed)
    with as_input_error("model"):
        density = attention_density(config)
        model = VicRegForPreTraining(config.vicreg)
    for section, encoder in zip(("model", "second_model"), model.encoders, strict=False):
        if encoder.main_input_name != "pixel_values":
            found = encoder.config.model_type
            raise InputError(f"`{section}.model_type`: expected an encoder of images, got {found!r}.")
    if config.views.num_local_views:
        _refuse_size(model, config.views.local_image_size)
    set_seed(run.seed + accelerator.process_index)  # one set of weights, but every process drops paths of its own
    processor = build_processor(config)
    probe = OnlineProbe(
        bank,
        test,
        processor,
        model,
        accelerator,
        neighbours=run.knn_neighbours,
        num_queries=run.knn_test_samples,
        linear=run.linear_probe,
    )
    trainer = Trainer(config, source, model, accelerator, probe.logged if probe.possible else None, stop)
    checkpoint = checkpoint_to_resume(run, accelerator)
    if checkpoint is not None:
        trainer.resume(checkpoint)

    start_folder(folder, RECIPE, yaml.safe_dump(config.to_recipe(), sort_keys=False), accelerator)
    sizes = [sum(one.numel() for one in encoder.parameters()) for encoder in trainer.unwrapped.encoders]
    logger.info(
        "%s images of %s, batch %d, %d steps; encoder of %s M parameters, attention density %.3f; covariance by %s",
        f"{len(source):,}" if isinstance(source, ImageSource) else "streamed",
        source.name,
        config.step_size,
        trainer.num_steps,
        " and ".join(f"{size / 1e6:.2f}" for size in sizes),
        density,
        covariance_form(config.step_size, config.vicreg.expander_sizes[-1]),
    )
    if probe.possible and "untrained" not in trainer.state.knn:
        trainer.state.note(probe.of_pixels())
        trainer.state.note(probe.of_encoders("untrained"))

    def results_now(state: RunState) -> dict[str, Any]:
        name = run.dataset_name
        return {
            "dataset": source.name,
            # what others can load it by; a folder of this machine they cannot
            "hub_dataset": name if name and name != "digits" and not os.path.exists(name) else None,
            "num_images": len(source) if isinstance(source, ImageSource) else state.step * config.step_size,
            "unusable_images": len(state.unusable),
            "steps": state.step,
            "planned_steps": trainer.num_steps,
            "skipped_steps": state.skipped_steps,
            "training_seconds": round(state.training_seconds, 1),
            "hardware": _hardware(accelerator),
            "encoder_parameters": sizes[0],
            "features": trainer.unwrapped.expander.in_features,
            "attention_density": density,
            "knn_neighbours": run.knn_neighbours,
            "knn_train_samples": len(bank) if bank is not None and probe.possible else 0,
            "knn_test_samples": probe.num_queries,
            "knn_accuracy": state.knn,
            "linear_accuracy": state.linear,
        }

    def push_snapshot(state: RunState) -> None:
        assert push is not None
        results = results_now(state)
        push.offer(
            f"step {state.step}",
            lambda into: export_snapshot(into, folder, trainer.unwrapped, processor, config.to_recipe(), results),
        )

    if push is not None and run.hub_strategy == "checkpoint":
        trainer.on_checkpoint = push_snapshot
    start_trackers(accelerator, folder, config.to_recipe(), trainer.state.step)
    try:
        with stop:
            state = trainer.fit()
    except BaseException as error:
        if push is not None:
            push.abandon()
        if isinstance(error, RunStopped):
            finish_trackers(accelerator)
        raise
    if probe.possible:
        state.note(probe.of_encoders("trained"))
    finish_trackers(accelerator)
    results = results_now(state)
    encoder = trainer.unwrapped.encoder.eval()

    def finish() -> None:
        records = read_log(folder / LOG_FILE)
        results.update(health_of(records, config.vicreg.gamma))
        with room_in(folder):
            write_unusable(folder, source, state.unusable)
            draw_curves(with_ends(records, results), folder / CURVES_FILE)
            export_run(folder, trainer.unwrapped, processor, config.to_recipe(), results)
        print(summary(folder, results, records))

    run_on_main(finish, accelerator)
    accelerator.wait_for_everyone()  # or the main process would leave while others still listen to it
    if push is not None:
        push.finish()
    return PretrainResult(folder, encoder, processor, results)


def attention_density(config: RunConfig) -> float:
    """Return the mean density of the encoder's attention at its own image size; 1 for encoders without a pattern.

    Raises:
        ValueError: The image is smaller than one patch.
    """
    encoder = config.vicreg.encoder
    if encoder.model_type != BigBirdViTModel.config_class.model_type:
        return 1.0
    with torch.device("meta"):
        patterns = BigBirdViTModel(encoder).attention_patterns(*encoder.image_size_hw)
    return sum(pattern.density for pattern in patterns) / len(patterns)


def _refuse_size(model: VicRegForPreTraining, side: int) -> None:
    """Fail before anything is written when the encoder takes no images of a local view's size."""
    try:
        with torch.no_grad():
            model.eval()(pixel_values=torch.zeros(2, 2, 3, side, side), return_loss=False)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"`views.local_image_size`: the encoder {model.config.encoder.model_type!r} takes no images of {side} "
            f"pixels: {' '.join(str(error).split())}"
        ) from error


def _hardware(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cuda":
        return f"{accelerator.num_processes} x {torch.cuda.get_device_name()}"
    cores = torch.get_num_threads() * accelerator.num_processes
    return f"{cores} CPU cores ({platform.machine()})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], run_settings))
