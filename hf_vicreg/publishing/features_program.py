"""What a model's folder gives to someone else: a script, run by its path in a process of its own, never imported.

`python -I features_program.py REQUEST.json`: loads each folder of the request and writes tensors of two fixed images
into a safetensors file. Without the package, which then cannot be imported at all, models load with
`trust_remote_code=True`: such a folder holds the package's own copies of its code. With the package no code of a
folder is ever run.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

gc.disable()  # what is imported stays, and the process is short: a fifth of its time


class NoPackage:
    """Makes an installed `hf_vicreg` impossible to import."""

    def find_spec(self, name, path=None, target=None):
        """Raise for the package, leave all else to others."""
        if name.partition(".")[0] == "hf_vicreg":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def images(folder):
    """Return two images of noise, of odd sizes, the same in every process.

    They are pictures, or, for a processor of other than three channels, arrays that fill the range of each channel.
    """
    import numpy as np
    from PIL import Image

    settings = Path(folder) / "preprocessor_config.json"
    settings = json.loads(settings.read_text()) if settings.is_file() else {}
    low, high = (np.array(settings.get(f"channel_{end}") or [0, 0, 0], np.float32) for end in ("low", "high"))
    found: list[Any] = []
    for height, width in ((75, 50), (40, 64)):
        state = height
        pixels = bytearray()
        for _ in range(height * width * len(low)):
            state = (1103515245 * state + 12345) % 2**31
            pixels.append(state >> 16 & 255)
        if len(low) == 3:
            found.append(Image.frombytes("RGB", (width, height), bytes(pixels)))
        else:
            shares = np.frombuffer(bytes(pixels), np.uint8).reshape(height, width, len(low)) / np.float32(255)
            found.append(low + (high - low) * shares)
    return found


def features_of(folder, subfolders, snippet, remote):
    """Return named tensors of a folder: pixels of both backends, outputs, of sub-folders as well."""
    import torch
    from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining
    from transformers.utils import is_torchvision_available

    trust = {"trust_remote_code": remote}
    found = {}
    backends = ["pil", "torchvision"] if is_torchvision_available() else ["pil"]
    for backend in backends:
        processor = AutoImageProcessor.from_pretrained(folder, backend=backend, **trust)
        found[f"pixels {backend}"] = processor(images(folder), return_tensors="pt")["pixel_values"]
    pixels = found[f"pixels {backends[-1]}"]
    architecture = json.loads((Path(folder) / "config.json").read_text()).get("architectures") or [""]
    with torch.no_grad():
        if architecture[0] == "VicRegDualEncoder":
            return found | logits_of(folder, pixels, snippet, trust)
        if architecture[0].endswith("ForImageClassification"):
            model = AutoModelForImageClassification.from_pretrained(folder, **trust).eval()
            found["logits"] = model(pixels).logits
        model = AutoModel.from_pretrained(folder, **trust).eval()
        found["features"] = model(pixels).last_hidden_state
        if "second_encoder" in subfolders:
            second = AutoModel.from_pretrained(folder, subfolder="second_encoder", **trust).eval()
            found["second features"] = second(pixels).last_hidden_state
        if "pretraining" in subfolders:
            wrapper = AutoModelForPreTraining.from_pretrained(folder, subfolder="pretraining", **trust).eval()
            found["embeddings"] = wrapper(pixel_values=torch.stack([pixels, pixels.flip(-1)], dim=1)).embeddings
        if snippet:
            exec(compile(snippet, "the card's snippet", "exec"), {"images": images(folder), "name": folder})
    return {name: tensor.contiguous() for name, tensor in found.items()}


def logits_of(folder, pixels, snippet, trust):
    """Return logits of a model of images and texts, by both of its Auto classes, and what its processor makes."""
    from transformers import AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor

    texts = AutoProcessor.from_pretrained(folder, **trust).tokenizer(
        ["a red flag", "two faces, and a longer text"], padding=True, return_tensors="pt"
    )
    found = {"tokens": texts["input_ids"]}
    for name, auto in (("logits", AutoModel), ("zero-shot logits", AutoModelForZeroShotImageClassification)):
        found[name] = auto.from_pretrained(folder, **trust).eval()(pixel_values=pixels, **texts).logits_per_image
    if snippet:
        exec(compile(snippet, "the card's snippet", "exec"), {"images": images(folder), "name": folder})
    return {name: tensor.contiguous() for name, tensor in found.items()}


def main():
    """Answer the request named on the command line."""
    request = json.loads(Path(sys.argv[1]).read_text())
    sys.path[:] = request["path"]
    if request["package"]:
        sys.path.insert(0, request["package"])
        import hf_vicreg  # noqa: F401
    else:
        sys.meta_path.insert(0, NoPackage())
    from safetensors.torch import save_file

    for folder, out in request["folders"].items():
        tensors = features_of(folder, request["subfolders"], request["snippet"], remote=not request["package"])
        save_file(tensors, out)


if __name__ == "__main__":
    main()
