"""The finished run as a folder that others can load: encoder, processor, card and results at its root."""

import json
from pathlib import Path
from typing import Any

from transformers import BaseImageProcessor
from transformers.utils import logging as transformers_logging

from hf_vicreg.model_cards.card import CardFacts, model_card
from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.training.evaluation.results import EVALUATIONS, FILE, read_results
from hf_vicreg.training.run_log import read_log

SECOND = "second_encoder"  # where the second branch's encoder lies


def export_run(
    folder: Path, model: VicRegForPreTraining, processor: BaseImageProcessor, recipe: dict[str, Any], results: dict
) -> None:
    """Write the encoder, its processor, the wrapper, the card and the results into the run's folder.

    Args:
        folder: The run's `output_dir`.
        model: The trained model; its encoder goes to the root, that of a second branch to `second_encoder/`, the
            whole of it to `pretraining/`.
        processor: The image processor whose pixels the features were measured on.
        recipe: The resolved configuration.
        results: What was measured; stored as `results.json` and read by the card.
    """
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder / "pretraining")
        model.encoder.save_pretrained(folder)
        if model.second_encoder is not None:
            model.second_encoder.save_pretrained(folder / SECOND)
            processor.save_pretrained(folder / SECOND)
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    processor.save_pretrained(folder)
    # what `hf-vicreg evaluate` has added since stays: a finished run may be resumed
    kept = {key: one for key, one in read_results(folder).items() if key == EVALUATIONS}
    (folder / FILE).write_text(json.dumps(results | kept, indent=1) + "\n")
    (folder / "README.md").write_text(
        model_card(
            CardFacts(
                name=folder.resolve().name,
                config=json.loads((folder / "config.json").read_text()),
                results=results,
                recipe=recipe,
                log=read_log(folder / "log.jsonl"),
                has_second_encoder=model.second_encoder is not None,
                has_pretraining=True,
            )
        )
    )
