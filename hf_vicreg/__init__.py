"""Pretrain BigBird vision transformers on your own images with VICReg, the Hugging Face way.

Importing the package registers its models with transformers' Auto classes. Training is imported when first used:
importing the package itself needs neither accelerate nor datasets.
"""

from typing import TYPE_CHECKING, Any

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
)

from hf_vicreg._version import __version__
from hf_vicreg.modeling.configuration_bigbird_vit import BigBirdViTConfig
from hf_vicreg.modeling.configuration_vicreg import VicRegConfig
from hf_vicreg.modeling.image_processing_bigbird_vit import BigBirdViTImageProcessor
from hf_vicreg.modeling.image_processing_pil_bigbird_vit import BigBirdViTImageProcessorPil
from hf_vicreg.modeling.modeling_bigbird_vit import (
    BigBirdViTBackbone,
    BigBirdViTForImageClassification,
    BigBirdViTModel,
)
from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.modeling.vicreg_loss import vicreg_loss

if TYPE_CHECKING:
    from hf_vicreg.publishing.publish import publish
    from hf_vicreg.training.pretrain import pretrain

AutoConfig.register("bigbird_vit", BigBirdViTConfig)
AutoConfig.register("vicreg", VicRegConfig)
AutoModel.register(BigBirdViTConfig, BigBirdViTModel)
AutoBackbone.register(BigBirdViTConfig, BigBirdViTBackbone)
AutoModelForImageClassification.register(BigBirdViTConfig, BigBirdViTForImageClassification)
AutoModelForPreTraining.register(VicRegConfig, VicRegForPreTraining)
AutoImageProcessor.register(
    BigBirdViTConfig,
    image_processor_classes={"torchvision": BigBirdViTImageProcessor, "pil": BigBirdViTImageProcessorPil},
)

__all__ = [
    "BigBirdViTBackbone",
    "BigBirdViTConfig",
    "BigBirdViTForImageClassification",
    "BigBirdViTImageProcessor",
    "BigBirdViTImageProcessorPil",
    "BigBirdViTModel",
    "VicRegConfig",
    "VicRegForPreTraining",
    "__version__",
    "pretrain",
    "publish",
    "vicreg_loss",
]


def __getattr__(name: str) -> Any:
    if name == "pretrain":
        from hf_vicreg.training.pretrain import pretrain

        return pretrain
    if name == "publish":
        from hf_vicreg.publishing.publish import publish

        return publish
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
