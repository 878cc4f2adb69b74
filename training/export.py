"""The finished run as a folder that others can load: encoder, processor, card and results at its root."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_vicreg.model_cards.card import CardFacts, model_card
from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.training.engine.encoders import ADAPTER
from hf_vicreg.training.evaluation.results import EVALUATIONS, FILE, read_results, write_results
from hf_vicreg.training.monitor.masked_pictures import MASKED_FILE
from hf_vicreg.training.monitor.run_log import LOG_FILE, read_log
from hf_vicreg.training.run.run_folder import RECIPE

SECOND = "second_encoder"  # where the second branch's encoder lies


def export_run(
    folder: Path,
    model: VicRegForPreTraining,
    encoders: Sequence[PreTrainedModel],
    processor: BaseImageProcessor,
    recipe: dict[str, Any],
    results: dict[str, Any],
) -> None:
    """Write the encoder, its processor, the wrapper, the card and the results into the run's folder.

    Args:
        folder: The run's `output_dir`.
        model: The trained model, as it is; it goes to `pretraining/`.
        encoders: The encoder goes to the root, that of a second branch to `second_encoder/`: the model's own, or the
            averages of their weights.
        processor: The image processor whose pixels the features were measured on.
        recipe: The resolved configuration.
        results: What was measured; stored as `results.json` and read by the card.
    """
    with _without_bars():
        model.save_pretrained(folder / "pretraining")
    _save_encoders(folder, encoders, processor)
    # what `hf-vicreg evaluate` has added since stays: a finished run may be resumed
    kept = {key: one for key, one in read_results(folder).items() if key == EVALUATIONS}
    for key in ("model_name_or_path", "teacher"):
        source = recipe.get(key)
        if source and os.path.isabs(source):  # where it lies on this machine is nobody's business
            recipe = recipe | {key: os.path.basename(source)}
    (folder / "README.md").write_text(
        model_card(
            CardFacts(
                name=folder.resolve().name,
                config=json.loads((folder / "config.json").read_text()),
                results=results,
                recipe=recipe,
                log=read_log(folder / LOG_FILE),
                has_second_encoder=model.second_encoder is not None,
                has_pretraining=True,
                has_adapter=(folder / ADAPTER).exists(),
                pictures=(MASKED_FILE,) if (folder / MASKED_FILE).exists() else (),
            )
        )
    )
    write_results(folder, results | kept)  # last: who finds it finds a run that is finished


def export_snapshot(
    folder: Path,
    run_folder: Path,
    encoders: Sequence[PreTrainedModel],
    processor: BaseImageProcessor,
    recipe: dict[str, Any],
    results: dict[str, Any],
) -> None:
    """Write what `hf-vicreg publish` needs of a run that is not finished into a folder of its own.

    Args:
        folder: Where to; it exists.
        run_folder: The run's `output_dir`.
        encoders: As they are now.
        processor: Its image processor.
        recipe: The resolved configuration.
        results: What has been measured so far.
    """
    _save_encoders(folder, encoders, processor)
    (folder / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False))
    (folder / FILE).write_text(json.dumps(results, indent=1) + "\n")
    if (run_folder / LOG_FILE).exists():
        shutil.copy(run_folder / LOG_FILE, folder / LOG_FILE)


def _save_encoders(folder: Path, encoders: Sequence[PreTrainedModel], processor: BaseImageProcessor) -> None:
    with _without_bars():
        for encoder, place in zip(encoders, (folder, folder / SECOND), strict=False):
            encoder.save_pretrained(place)
            processor.save_pretrained(place)


@contextmanager
def _without_bars() -> Iterator[None]:
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
