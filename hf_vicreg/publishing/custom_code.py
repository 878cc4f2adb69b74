"""The model's code beside its weights, so that `trust_remote_code=True` loads it where this package is not installed.

transformers looks for code at the root of a repository alone, and in flat files that import each other as
`from .sibling import name`: our `modeling/` as it is.
"""

import ast
import json
from importlib import resources
from pathlib import Path
from typing import Any

ENCODER_CLASSES = {
    "AutoConfig": "configuration_bigbird_vit.BigBirdViTConfig",
    "AutoModel": "modeling_bigbird_vit.BigBirdViTModel",
    "AutoModelForImageClassification": "modeling_bigbird_vit.BigBirdViTForImageClassification",
    "AutoModelForMaskedImageModeling": "modeling_bigbird_masked_image.BigBirdViTForMaskedImageModeling",
    "AutoBackbone": "modeling_bigbird_vit.BigBirdViTBackbone",
}
WRAPPER_CLASSES = {
    "AutoConfig": "configuration_vicreg.VicRegConfig",
    "AutoModelForPreTraining": "modeling_vicreg.VicRegForPreTraining",
}
MAE_CLASSES = {
    "AutoConfig": "configuration_bigbird_mae.BigBirdViTMAEConfig",
    "AutoModelForPreTraining": "modeling_bigbird_mae.BigBirdViTMAEForPreTraining",
}
DUAL_CLASSES = {
    "AutoConfig": "configuration_vicreg_dual_encoder.VicRegDualEncoderConfig",
    "AutoModel": "modeling_vicreg_dual_encoder.VicRegDualEncoder",
    "AutoModelForZeroShotImageClassification": "modeling_vicreg_dual_encoder.VicRegDualEncoder",
}
PROCESSOR = "BigBirdViTImageProcessor"
PROCESSOR_CLASSES = {
    "torchvision": "image_processing_bigbird_vit.BigBirdViTImageProcessor",
    "pil": "image_processing_pil_bigbird_vit.BigBirdViTImageProcessorPil",
}
AUTO_MAPS = {
    "bigbird_vit": ENCODER_CLASSES,
    "vicreg": WRAPPER_CLASSES,
    "bigbird_vit_mae": MAE_CLASSES,
    "vicreg_dual_encoder": DUAL_CLASSES,
}


def source_of(module: str) -> str:
    """Return the source text of one of our modules of the model, by its bare name."""
    return (resources.files("hf_vicreg.modeling") / f"{module}.py").read_text(encoding="utf-8")


def with_siblings(modules: set[str]) -> set[str]:
    """Return these modules and all that they import from their siblings, directly or not."""
    found: set[str] = set()
    waiting = set(modules)
    while waiting:
        module = waiting.pop()
        found.add(module)
        for node in ast.walk(ast.parse(source_of(module))):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                waiting |= {node.module} - found
    return found


def write_custom_code(folder: Path, configs: list[Path]) -> list[str]:
    """Write the code that the configurations in a staged folder need, and name its classes in them.

    Args:
        folder: The staged folder; code goes to its root.
        configs: The `config.json` files in it and below, which name no code yet. Only those of our model types need
            code; the image processor at the root does if it is ours.

    Returns:
        Names of the files written.
    """
    modules: set[str] = set()
    for path in configs:
        config = json.loads(path.read_text())
        classes = AUTO_MAPS.get(config.get("model_type"))
        if classes is not None:
            _write_json(path, config | {"auto_map": classes})
            modules |= {name.split(".")[0] for name in classes.values()}
    processors = sorted({path.parent / "preprocessor_config.json" for path in configs})
    # last: saving a processor again would keep one of its two classes
    for path in processors:
        processor = json.loads(path.read_text()) if path.exists() else {}
        if str(processor.get("image_processor_type", "")).startswith(PROCESSOR):
            # either backend may have saved it; transformers looks for the second by the name of the first
            ours = {"image_processor_type": PROCESSOR, "auto_map": {"AutoImageProcessor": PROCESSOR_CLASSES}}
            _write_json(path, processor | ours)
            modules |= {name.split(".")[0] for name in PROCESSOR_CLASSES.values()}
    written = sorted(f"{module}.py" for module in with_siblings(modules))
    for name in written:
        (folder / name).write_text(source_of(name.removesuffix(".py")), encoding="utf-8")
    return written


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
