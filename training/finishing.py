"""The end of a pretraining run: its steps taken, what they came to, and the folder that is left."""

import os
import platform
import time
from typing import Any

import torch
from accelerate import Accelerator

from hf_vicreg.modeling.modeling_vicreg import representation_size
from hf_vicreg.training.building import Run
from hf_vicreg.training.engine.checkpoint import RunState
from hf_vicreg.training.engine.encoders import ADAPTER, merge_adapters, merged
from hf_vicreg.training.errors import RunStopped, room_in
from hf_vicreg.training.evaluation.encoder import public_name
from hf_vicreg.training.export import export_run, export_snapshot
from hf_vicreg.training.images.sources import ImageSource
from hf_vicreg.training.images.unusable import write_unusable
from hf_vicreg.training.launch.devices import device_name
from hf_vicreg.training.launch.distributed import run_on_main
from hf_vicreg.training.launch.sharding import is_sharded, unsharded
from hf_vicreg.training.monitor.curves import CURVES_FILE, draw_curves, with_ends
from hf_vicreg.training.monitor.doctor import health_of
from hf_vicreg.training.monitor.run_log import LOG_FILE, read_log
from hf_vicreg.training.monitor.summary import summary
from hf_vicreg.training.monitor.tracking import finish_trackers
from hf_vicreg.training.pretrained.companions import take_away_teacher
from hf_vicreg.training.run.places import is_shards


def fit(run: Run) -> None:
    """Take the steps, pushing snapshots on the way where that is asked for; every process must call.

    Raises:
        InputError: What `TrainingLoop.fit` refuses.
        RunStopped: The run was asked to stop; it has a checkpoint and a list of the images it passed over.
    """
    if run.push is not None and run.config.run.hub_strategy == "checkpoint":
        run.loop.on_checkpoint = lambda state: _push_snapshot(run, state)
    try:
        with run.stop:
            run.loop.fit()
    except BaseException as error:
        if run.push is not None:
            run.push.abandon()
        if isinstance(error, RunStopped):
            finish_trackers(run.accelerator)
            # the others wait: a launcher ends the rest as soon as one leaves
            run_on_main(lambda: _list_unusable(run), run.accelerator)
        raise


def finish(run: Run, began: float) -> dict[str, Any]:
    """Measure, draw and export, and return what `results.json` holds; every process must call.

    Args:
        run: Its steps taken.
        began: When the command began, by `time.monotonic`.

    Raises:
        InputError: The disk is full.
    """
    state = run.loop.state
    if is_sharded(run.model):
        run.model = run.probe.model = unsharded(run.model)
        if run.loop.step.average is not None:
            run.loop.step.average.gather()
            run.probe.averages = run.encoders
    with room_in(run.folder):
        _merge(run)
    if run.probe.possible:
        state.note(run.probe.of_encoders("trained"))
    figures = {} if run.captions_probe is None else run.captions_probe.measure()
    if figures:
        run.loop.note(figures)
    finish_trackers(run.accelerator)
    results = results_of(run, state) | ({"image_text": figures} if figures else {})
    exports = run.exports
    for one in exports:
        one.model.eval()

    entry = run.config.entry

    def write() -> None:
        records = read_log(run.folder / LOG_FILE)
        results.update(health_of(records, run.config.vicreg.gamma, entry))
        with room_in(run.folder):
            write_unusable(run.folder, run.source, state.unusable)
            draw_curves(with_ends(records, results), run.folder / CURVES_FILE, entry.parts)
            if run.pictures is not None:
                run.pictures.draw()
            export_run(run.folder, run.model, exports, run.config.to_recipe(), results)
        flags = run.config.run
        kinds = {
            "is_dual": flags.caption_column is not None,
            "has_source": flags.model_name_or_path is not None,
        }
        seconds = time.monotonic() - began
        print(summary(run.folder, results, records, seconds=seconds, time_budget=flags.time_budget, **kinds))

    run_on_main(write, run.accelerator)
    run.accelerator.wait_for_everyone()  # or the main process would leave while others still listen to it
    if run.push is not None:
        run.push.finish()
    return results


def results_of(run: Run, state: RunState) -> dict[str, Any]:
    """Return what `results.json` says of a run at a step."""
    flags, step_size, entry = run.config.run, run.config.step_size, run.config.entry
    name, cost = flags.dataset_name, run.loop.step.cost
    return {
        "dataset": run.source.name,
        # what others can load it by; a folder of this machine they cannot
        "hub_dataset": None if not name or name == "digits" or os.path.exists(name) or is_shards(name) else name,
        "num_images": len(run.source) if isinstance(run.source, ImageSource) else state.step * step_size,
        "unusable_images": len(state.unusable),
        "steps": state.step,
        "planned_steps": run.loop.step.num_steps,
        "skipped_steps": state.skipped_steps,
        "training_seconds": round(state.training_seconds, 1),
        "hardware": _hardware(run.accelerator),
        "encoder_parameters": sum(one.numel() for one in run.exports[0].model.parameters()),
        "features": _features(run),
        "objective": entry.name,
        "method": entry.title,
        "loss_parts": list(entry.parts),
        "attention_density": run.density,
        "knn_neighbours": flags.knn_neighbours,
        "knn_train_samples": len(run.bank) if run.bank is not None and run.probe.possible else 0,
        "knn_test_samples": run.probe.num_queries,
        "knn_accuracy": state.knn,
        "linear_accuracy": state.linear,
        **({} if cost is None or cost.found is None else {"flops_per_step": cost.found.flops}),
    }


def _features(run: Run) -> int:
    vicreg = run.config.vicreg
    return representation_size(vicreg.encoder) if run.captions is None else vicreg.expander_sizes[-1]


def _merge(run: Run) -> None:
    """Make what adapters have learned part of the weights, and part from the teacher; every process must call."""
    first = run.accelerator.is_main_process
    source = public_name(run.config.run.model_name_or_path or "")
    merge_adapters(run.encoders[0], run.folder / ADAPTER if first else None, source)
    merge_adapters(run.model)
    take_away_teacher(run.model)


def _list_unusable(run: Run) -> None:
    with room_in(run.folder):
        write_unusable(run.folder, run.source, run.loop.state.unusable)


def _push_snapshot(run: Run, state: RunState) -> None:
    assert run.push is not None
    results, recipe = results_of(run, state), run.config.to_recipe()
    exports = run.exported([merged(one) for one in run.branches])
    run.push.offer(
        f"step {state.step}",
        lambda into: export_snapshot(into, run.folder, exports, recipe, results),
    )


def _hardware(accelerator: Accelerator) -> str:
    if accelerator.device.type != "cpu":
        return f"{accelerator.num_processes} x {device_name(accelerator.device)}"
    cores = torch.get_num_threads() * accelerator.num_processes
    return f"{cores} CPU core{'s' * (cores != 1)} ({platform.machine()})"
