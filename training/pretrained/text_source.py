"""The text side of a run: its architecture among the run's settings, and the weights it begins with."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_MAPPING, PreTrainedModel

from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining, pooled_features, representation_size
from hf_vicreg.modeling.modeling_vicreg_dual_encoder import VicRegDualEncoder
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import load_config, load_weights, no_model, public_name
from hf_vicreg.training.pretrained.warm_start import architecture
from hf_vicreg.training.run.config import RunConfig
from hf_vicreg.training.run.run_folder import RECIPE
from hf_vicreg.training.run.settings import read_recipe

logger = logging.getLogger("hf_vicreg.training.pretrain")  # one voice for the whole command

FIELD = "text_model"
# of a text encoder that is given no weights: a DistilBERT a tenth of the usual size
SMALL = {
    "model_type": "distilbert",
    "dim": 256,
    "n_layers": 3,
    "n_heads": 4,
    "hidden_dim": 1024,
    "vocab_size": 4000,
    "max_position_embeddings": 128,
}


def with_text(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a run's settings with a text encoder as its second model, if its images have captions.

    Where the run is resumed it is that of its recipe.

    Raises:
        InputError: No text encoder there, or a field that its weights decide, given otherwise.
    """
    if settings.get("caption_column") is None:
        return settings
    name, given = settings.get(FIELD), settings.get("second_model", {})
    stored = Path(settings["output_dir"]) / RECIPE
    if settings.get("resume_from_checkpoint") is not None and stored.is_file():
        recipe = read_recipe(str(stored))
        kept = {FIELD: recipe.get(FIELD) or name} if name else {}
        return settings | kept | {"second_model": (recipe.get("second_model") or {}) | given}
    if not name:
        small = given.get("model_type", SMALL["model_type"]) == SMALL["model_type"]
        return settings | {"second_model": (SMALL if small else {}) | given}
    encoder, _ = load_text_encoder(name)
    fields = architecture(encoder.config)
    for key, value in given.items():
        if key in fields and value != fields[key]:
            raise InputError(
                f"`second_model.{key}`: expected {fields[key]!r} as in `{FIELD}`, got {value!r}; leave it out."
            )
    where = os.path.abspath(name) if os.path.isdir(name) else name
    return settings | {FIELD: where, "second_model": fields | given}


def take_text_weights(model: VicRegForPreTraining, name: str) -> None:
    """Give the run's text encoder the weights of `text_model`, and say so."""
    source, missing = load_text_encoder(name)
    assert model.second_encoder is not None
    weights = {key: one for key, one in source.state_dict().items() if key not in missing}
    model.second_encoder.load_state_dict(weights, strict=False)
    logger.info("the text encoder begins with the weights of %s, a %s", public_name(name), source.config.model_type)
    if missing:
        logger.warning("%s has no weights for its pooler, which begins at random", public_name(name))


def refuse_other_encoders(model: VicRegForPreTraining, config: RunConfig) -> None:
    """Raise InputError for encoders that do not take what the run has, images or images and captions.

    Of texts without a pooled output the mean over their tokens is taken, which is said.
    """
    second = "input_ids" if config.run.caption_column is not None else "pixel_values"
    for section, encoder, wanted in zip(
        ("model", "second_model"), model.encoders, ("pixel_values", second), strict=False
    ):
        if encoder.main_input_name != wanted or encoder.config.is_encoder_decoder:
            what = "images" if wanted == "pixel_values" else "texts"
            raise InputError(
                f"`{section}.model_type`: expected an encoder of {what}, got {encoder.config.model_type!r}."
            )
    if second == "input_ids":
        assert model.second_encoder is not None
        _refuse_silent(model.second_encoder, config.vicreg.second_encoder.model_type)


def load_text_encoder(name: str) -> tuple[PreTrainedModel, set[str]]:
    """Return the text encoder in a folder or on the Hub, of a model of images and text its text tower, and what it
    lacks.

    Raises:
        InputError: None there, or one that lacks more than a pooler.
    """
    config = load_config(name, FIELD)
    tower = getattr(config, "text_config", None)
    own = config.model_type == VicRegDualEncoder.config_class.model_type
    model_class: Any = VicRegDualEncoder if own else MODEL_MAPPING.get(type(tower or config), None)
    if not own and (model_class is None or model_class.main_input_name != "input_ids" or config.is_encoder_decoder):
        raise InputError(
            f"`{FIELD}`: expected a text encoder, got {name!r} of type {config.model_type!r}; name one as BERT is."
        )
    try:
        model, info = load_weights(model_class, name, **({} if tower is None or own else {"config": tower}))
    except (OSError, ValueError, StrictDataclassError) as error:
        raise no_model(name, error, FIELD) from error
    missing = set(info["missing_keys"])
    needed = sorted(one for one in missing if "pooler" not in one)
    if needed:
        raise InputError(
            f"`{FIELD}`: expected weights for the whole encoder in {name!r}, found none for {needed[0]}; name a "
            "complete checkpoint of it."
        )
    return (model.text_model if own else model), missing


@torch.no_grad()
def _refuse_silent(encoder: PreTrainedModel, kind: str) -> None:
    try:
        outputs = encoder.eval()(input_ids=torch.tensor([[5, 6, 7], [5, 8, 7]]))
        features = pooled_features(outputs)
        assert features.shape == (2, representation_size(encoder.config))
    except Exception as error:  # whatever a model of another kind makes of a text
        raise InputError(
            f"`second_model.model_type`: expected a text encoder, but a {kind!r} makes no features of a text: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    if torch.equal(features[0], features[1]):
        raise InputError(
            f"`second_model.model_type`: expected an encoder that tells texts apart, a {kind!r} has the same features "
            "for all: it looks for an end of its own tokenizer; name a checkpoint by --text_model, or take 'bert'."
        )
    if getattr(outputs, "pooler_output", None) is None:
        logger.info(
            "a %s has no pooled output: the feature of a text is the mean of its tokens, padding left out", kind
        )
