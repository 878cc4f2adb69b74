"""The finished run as a folder that others can load: encoder, processor, card and results at its root."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from hf_vicreg.model_cards.card import CardFacts, model_card, with_folders_named
from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.modeling.modeling_vicreg_dual_encoder import VicRegDualEncoder
from hf_vicreg.training.engine.encoders import ADAPTER
from hf_vicreg.training.evaluation.results import EVALUATIONS, FILE, read_results, write_results
from hf_vicreg.training.monitor.masked_pictures import MASKED_FILE
from hf_vicreg.training.monitor.run_log import LOG_FILE, read_log
from hf_vicreg.training.run.run_folder import RECIPE

SECOND = "second_encoder"  # where the second branch's encoder lies
IMAGES, TEXTS = "image_encoder", "text_encoder"  # where the encoders of a run with captions lie, each by itself
DUAL_PROCESSOR = "VisionTextDualEncoderProcessor"  # transformers' own: an image processor and a tokenizer, of any kind


class Export(NamedTuple):
    """A model of a run's folder.

    Attributes:
        place: Folder inside of it; empty is the root.
        model: What is saved there.
        companions: Its processor, its tokenizer.
    """

    place: str
    model: PreTrainedModel
    companions: tuple[Any, ...]


def exported_encoders(encoders: Sequence[PreTrainedModel], processor: BaseImageProcessor) -> list[Export]:
    """Return the encoder at the root, and that of a second branch in `second_encoder/`."""
    return [Export(place, one, (processor,)) for place, one in zip(("", SECOND), encoders, strict=False)]


def exported_dual(
    model: VicRegForPreTraining,
    branches: Sequence[Any],
    processor: BaseImageProcessor,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Export]:
    """Return the model of images and texts at the root, and each of its encoders by itself.

    `AutoProcessor` finds image processor and tokenizer by the class that the tokenizer's file names.
    """
    dual = VicRegDualEncoder.from_pretraining(model, branches)
    tokenizer.init_kwargs["processor_class"] = DUAL_PROCESSOR
    return [
        Export("", dual, (processor, tokenizer)),
        Export(IMAGES, dual.vision_model, (processor,)),
        Export(TEXTS, dual.text_model, (tokenizer,)),
    ]


def export_run(
    folder: Path,
    model: VicRegForPreTraining,
    exports: Sequence[Export],
    recipe: dict[str, Any],
    results: dict[str, Any],
) -> None:
    """Write the encoder, its processor, the wrapper, the card and the results into the run's folder.

    Args:
        folder: The run's `output_dir`.
        model: The trained model, as it is; it goes to `pretraining/`.
        exports: Models with their processors and tokenizers, the one at the root first.
        recipe: The resolved configuration.
        results: What was measured; stored as `results.json` and read by the card.
    """
    with _without_bars():
        model.save_pretrained(folder / "pretraining")
    _save(folder, exports)
    # what `hf-vicreg evaluate` has added since stays: a finished run may be resumed
    kept = {key: one for key, one in read_results(folder).items() if key == EVALUATIONS}
    (folder / "README.md").write_text(
        model_card(
            CardFacts(
                name=folder.resolve().name,
                config=json.loads((folder / "config.json").read_text()),
                results=results,
                recipe=with_folders_named(recipe),  # where they lie on this machine is nobody's business
                log=read_log(folder / LOG_FILE),
                has_second_encoder=any(one.place == SECOND for one in exports),
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
    exports: Sequence[Export],
    recipe: dict[str, Any],
    results: dict[str, Any],
) -> None:
    """Write what `hf-vicreg publish` needs of a run that is not finished into a folder of its own.

    Args:
        folder: Where to; it exists.
        run_folder: The run's `output_dir`.
        exports: Its models, as they are now.
        recipe: The resolved configuration.
        results: What has been measured so far.
    """
    _save(folder, exports)
    (folder / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False))
    (folder / FILE).write_text(json.dumps(results, indent=1) + "\n")
    if (run_folder / LOG_FILE).exists():
        shutil.copy(run_folder / LOG_FILE, folder / LOG_FILE)


def _save(folder: Path, exports: Sequence[Export]) -> None:
    with _without_bars():
        for one in exports:
            for part in (one.model, *one.companions):
                part.save_pretrained(folder / one.place)


@contextmanager
def _without_bars() -> Iterator[None]:
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
