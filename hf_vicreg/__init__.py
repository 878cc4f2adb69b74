"""Pretrain BigBird vision transformers on your own images with VICReg, the Hugging Face way.

Importing the package registers its models with transformers' Auto classes: at once if transformers is imported
already, else when it is. Everything else is imported when first used: the package itself needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hf_vicreg._registration import register, register_with_transformers
from hf_vicreg._version import __version__

if TYPE_CHECKING:
    from hf_vicreg.modeling.configuration_bigbird_mae import BigBirdViTMAEConfig
    from hf_vicreg.modeling.configuration_bigbird_vit import BigBirdViTConfig
    from hf_vicreg.modeling.configuration_vicreg import VicRegConfig
    from hf_vicreg.modeling.configuration_vicreg_dual_encoder import VicRegDualEncoderConfig
    from hf_vicreg.modeling.image_processing_bigbird_vit import BigBirdViTImageProcessor
    from hf_vicreg.modeling.image_processing_pil_bigbird_vit import BigBirdViTImageProcessorPil
    from hf_vicreg.modeling.modeling_bigbird_mae import BigBirdViTMAEForPreTraining
    from hf_vicreg.modeling.modeling_bigbird_masked_image import BigBirdViTForMaskedImageModeling
    from hf_vicreg.modeling.modeling_bigbird_vit import (
        BigBirdViTBackbone,
        BigBirdViTForImageClassification,
        BigBirdViTModel,
    )
    from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
    from hf_vicreg.modeling.modeling_vicreg_dual_encoder import VicRegDualEncoder
    from hf_vicreg.modeling.vicreg_loss import vicreg_loss
    from hf_vicreg.publishing.publish import publish
    from hf_vicreg.report.figures import show_attention, show_features, show_views
    from hf_vicreg.training.prepare.embed import embed
    from hf_vicreg.training.pretrain import pretrain
    from hf_vicreg.weights import load

__all__ = [
    "BigBirdViTBackbone",
    "BigBirdViTConfig",
    "BigBirdViTForImageClassification",
    "BigBirdViTForMaskedImageModeling",
    "BigBirdViTImageProcessor",
    "BigBirdViTImageProcessorPil",
    "BigBirdViTMAEConfig",
    "BigBirdViTMAEForPreTraining",
    "BigBirdViTModel",
    "VicRegConfig",
    "VicRegDualEncoder",
    "VicRegDualEncoderConfig",
    "VicRegForPreTraining",
    "__version__",
    "embed",
    "load",
    "pretrain",
    "publish",
    "show_attention",
    "show_features",
    "show_views",
    "vicreg_loss",
]

_HOMES = {
    "BigBirdViTBackbone": "hf_vicreg.modeling.modeling_bigbird_vit",
    "BigBirdViTConfig": "hf_vicreg.modeling.configuration_bigbird_vit",
    "BigBirdViTForImageClassification": "hf_vicreg.modeling.modeling_bigbird_vit",
    "BigBirdViTForMaskedImageModeling": "hf_vicreg.modeling.modeling_bigbird_masked_image",
    "BigBirdViTImageProcessor": "hf_vicreg.modeling.image_processing_bigbird_vit",
    "BigBirdViTImageProcessorPil": "hf_vicreg.modeling.image_processing_pil_bigbird_vit",
    "BigBirdViTMAEConfig": "hf_vicreg.modeling.configuration_bigbird_mae",
    "BigBirdViTMAEForPreTraining": "hf_vicreg.modeling.modeling_bigbird_mae",
    "BigBirdViTModel": "hf_vicreg.modeling.modeling_bigbird_vit",
    "VicRegConfig": "hf_vicreg.modeling.configuration_vicreg",
    "VicRegDualEncoder": "hf_vicreg.modeling.modeling_vicreg_dual_encoder",
    "VicRegDualEncoderConfig": "hf_vicreg.modeling.configuration_vicreg_dual_encoder",
    "VicRegForPreTraining": "hf_vicreg.modeling.modeling_vicreg",
    "embed": "hf_vicreg.training.prepare.embed",
    "load": "hf_vicreg.weights",
    "pretrain": "hf_vicreg.training.pretrain",
    "publish": "hf_vicreg.publishing.publish",
    "show_attention": "hf_vicreg.report.figures",
    "show_features": "hf_vicreg.report.figures",
    "show_views": "hf_vicreg.report.figures",
    "vicreg_loss": "hf_vicreg.modeling.vicreg_loss",
}

register_with_transformers()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register()
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
