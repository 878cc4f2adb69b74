"""Tells transformers' Auto classes of our models, when both packages are imported, whichever comes first.

Importing transformers and the models takes seconds, which a command's `--help` need not wait for. So
`import hf_vicreg` registers at once if transformers is there, and else when it is imported. See
docs/decisions/0007-light-import.md.
"""

import logging
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TRANSFORMERS = "transformers"

logger = logging.getLogger(__name__)
_lock = threading.RLock()  # again by the same thread: what is imported on the way may ask again
_done = False


def register_with_transformers() -> None:
    """Register now if transformers is imported, else as soon as it is."""
    if TRANSFORMERS in sys.modules:
        register()
    elif not any(isinstance(one, _Finder) for one in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def register() -> None:
    """Register models, configurations and processors with the Auto classes, once; other threads wait until it is."""
    with _lock:
        _register_once()


def _register_once() -> None:
    global _done
    if _done:
        return
    _done = True  # first: what follows imports modules that may ask again
    try:
        _register()
    except BaseException:
        _done = False
        raise


def _register() -> None:
    from transformers import (
        AutoBackbone,
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageClassification,
        AutoModelForMaskedImageModeling,
        AutoModelForPreTraining,
        AutoModelForZeroShotImageClassification,
    )

    from hf_vicreg.modeling import (
        configuration_bigbird_mae,
        configuration_bigbird_vit,
        configuration_vicreg,
        configuration_vicreg_dual_encoder,
        image_processing_bigbird_vit,
        image_processing_pil_bigbird_vit,
        modeling_bigbird_mae,
        modeling_bigbird_masked_image,
        modeling_bigbird_vit,
        modeling_vicreg,
        modeling_vicreg_dual_encoder,
    )

    config = configuration_bigbird_vit.BigBirdViTConfig
    vicreg = configuration_vicreg.VicRegConfig
    mae = configuration_bigbird_mae.BigBirdViTMAEConfig
    AutoConfig.register("bigbird_vit", config)
    AutoConfig.register("vicreg", vicreg)
    AutoConfig.register("bigbird_vit_mae", mae)
    AutoModel.register(config, modeling_bigbird_vit.BigBirdViTModel)
    AutoBackbone.register(config, modeling_bigbird_vit.BigBirdViTBackbone)
    AutoModelForImageClassification.register(config, modeling_bigbird_vit.BigBirdViTForImageClassification)
    AutoModelForMaskedImageModeling.register(config, modeling_bigbird_masked_image.BigBirdViTForMaskedImageModeling)
    AutoModelForPreTraining.register(vicreg, modeling_vicreg.VicRegForPreTraining)
    AutoModelForPreTraining.register(mae, modeling_bigbird_mae.BigBirdViTMAEForPreTraining)
    dual = configuration_vicreg_dual_encoder.VicRegDualEncoderConfig
    AutoConfig.register("vicreg_dual_encoder", dual)
    for auto in (AutoModel, AutoModelForZeroShotImageClassification):
        auto.register(dual, modeling_vicreg_dual_encoder.VicRegDualEncoder)
    AutoImageProcessor.register(
        config,
        image_processor_classes={
            "torchvision": image_processing_bigbird_vit.BigBirdViTImageProcessor,
            "pil": image_processing_pil_bigbird_vit.BigBirdViTImageProcessorPil,
        },
    )


class _Finder:
    """Finds transformers as the other finders do, with a loader that registers afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TRANSFORMERS:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader(Loader):
    """Another loader, and registration after it. That loader is the module's again before the module runs."""

    def __init__(self, loader: Any, finder: _Finder):
        self.loader = loader
        self.finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        if not _lock.acquire(blocking=False):
            return  # another thread waits for this import in order to register
        try:
            _register_once()
        except Exception as error:  # never in the way of an import of transformers; using our names raises it again
            logger.warning("hf_vicreg could not register its models: %s: %s", type(error).__name__, error)
        finally:
            _lock.release()
