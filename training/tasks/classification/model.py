"""A classifier of images from any vision model: the encoder's weights, a new head, names for its classes."""

import logging
from collections.abc import Sequence

from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from hf_vicreg.model_cards.shipped import located
from hf_vicreg.modeling.configuration_bigbird_vit import BigBirdViTConfig
from hf_vicreg.modeling.configuration_vicreg import VicRegConfig
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import load_config, load_weights
from hf_vicreg.training.launch.distributed import build_accelerator

logger = logging.getLogger(__name__)


def build_classifier(name: str, class_names: Sequence[str], *, from_scratch: bool, seed: int) -> PreTrainedModel:
    """Return a classifier with the pretrained encoder's weights and a new head.

    A head that is there already is kept if it has as many classes.

    Args:
        name: Folder or Hub id: of a run, or of another vision model.
        class_names: One for each class index.
        from_scratch: Take the configuration, not the weights.
        seed: Of all new weights.

    Raises:
        InputError: No model there, none that classifies images, or weights of the encoder missing.
    """
    refuse_wrapper(name)
    numbered = dict(enumerate(class_names))
    labels = {"id2label": numbered, "label2id": {one: index for index, one in numbered.items()}}
    set_seed(seed)
    try:
        if from_scratch:
            return AutoModelForImageClassification.from_config(
                AutoConfig.from_pretrained(located(name), trust_remote_code=False, **labels)
            )
        model, info = load_weights(AutoModelForImageClassification, name, ignore_mismatched_sizes=True, **labels)
    except (OSError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"`MODEL`: expected the folder or Hub id of a vision model in safetensors form, got {name!r}: {reason}"
        ) from error
    missing = sorted(key for key in info["missing_keys"] if key.startswith(f"{model.base_model_prefix}."))
    if missing:
        raise InputError(
            f"`MODEL`: expected weights for the whole encoder in {name}, found none for {missing[0]} and "
            f"{len(missing) - 1} more."
        )
    return model


def refuse_wrapper(name: str) -> None:
    """Raise InputError for the wrapper around an encoder, which has no form with a classifier's head."""
    if isinstance(load_config(name), VicRegConfig):
        raise InputError(f"`MODEL`: expected an encoder, {name} is the wrapper around one; give the run's folder.")


def classifier_accelerator(name: str, mixed_precision: str) -> Accelerator:
    """Return processes and device for a classifier from a model."""
    # models of others may have parameters that no forward pass reaches (DINOv2's mask token)
    all_used = load_config(name).model_type == BigBirdViTConfig.model_type
    return build_accelerator(mixed_precision, find_unused_parameters=not all_used)
