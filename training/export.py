"""The finished run as a folder that others can load: encoder, processor, card and results at its root."""

import json
import string
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from transformers import BaseImageProcessor
from transformers.utils import logging as transformers_logging

from hf_vicreg.modeling.configuration_bigbird_vit import BigBirdViTConfig
from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining

PATHS = {"output_dir", "train_dir", "dataset_name"}  # of the machine it ran on; the card names the data itself
SECOND = "second_encoder"  # where the second branch's encoder lies
LOADING_SNIPPET = """\
import hf_vicreg; from transformers import AutoImageProcessor, AutoModel
processor, model = AutoImageProcessor.from_pretrained("{folder}"), AutoModel.from_pretrained("{folder}")
features = model(**processor(images, return_tensors="pt")).pooler_output  # (images, {features})"""


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
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "README.md").write_text(model_card(folder.resolve().name, recipe, results))


def model_card(name: str, recipe: dict[str, Any], results: dict[str, Any]) -> str:
    """Return the model card in Markdown; what was not measured reads "not measured"."""
    template = (resources.files("hf_vicreg.model_cards") / "template.md").read_text()
    knn = results.get("knn_accuracy", {})
    measured = {
        key: f"{knn[key]:.3f}" if key in knn else "not measured" for key in ("raw_pixels", "untrained", "trained")
    }
    return string.Template(template).substitute(
        measured,
        name=name,
        model_type=recipe["model"].get("model_type", BigBirdViTConfig.model_type),
        dataset=results["dataset"],
        num_images=f"{results['num_images']:,}",
        parameters=f"{results['encoder_parameters'] / 1e6:.2f}",
        density=f"{results['attention_density']:.3f}",
        minutes=f"{results['training_seconds'] / 60:.1f}",
        hardware=results["hardware"],
        neighbours=results["knn_neighbours"],
        snippet=LOADING_SNIPPET.format(folder=name, features=results["features"]),
        recipe=yaml.safe_dump({key: value for key, value in recipe.items() if key not in PATHS}, sort_keys=False),
    )
