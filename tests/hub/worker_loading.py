"""What someone gets who loads a published model: a script for a process, and an environment, of its own.

`python worker_loading.py REQUEST.json`. The request has entries of a role, an `encoder` and a `classifier`, as folders
or ids on the Hub, and an `out` to write tensors to. A `"stranger"` has torch, transformers and pillow and trusts
remote code; a `"friend"` has the package and does not; the `"owner"` has the folders and the package's own classes.
"""

import json
import sys
from pathlib import Path

ABSENT = ("hf_vicreg", "accelerate", "datasets", "torchvision")


def images():
    """Return two PIL images, the same everywhere."""
    from PIL import Image

    return [Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 20).convert("RGB") for size in ((50, 75), (64, 40))]


def load(role, encoder, classifier, out):
    """Load everything and store what it gives."""
    trust = {}
    if role == "stranger":
        trust = {"trust_remote_code": True}
        for name in ABSENT:
            try:
                __import__(name)
            except ModuleNotFoundError:
                continue
            raise AssertionError(f"{name} can be imported")
    else:
        import hf_vicreg

    import torch
    from safetensors.torch import save_file
    from transformers import (
        AutoBackbone,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageClassification,
        AutoModelForMaskedImageModeling,
        AutoModelForPreTraining,
        DetrConfig,
        DetrForObjectDetection,
        pipeline,
    )

    found = {}
    with torch.no_grad():
        processor = AutoImageProcessor.from_pretrained(encoder, backend="pil", **trust)
        assert type(processor).__name__ == "BigBirdViTImageProcessorPil"
        pixels = found["pixels"] = processor(images(), return_tensors="pt")["pixel_values"]
        model = AutoModel.from_pretrained(encoder, **trust)
        outputs = model(pixels)
        found["last_hidden_state"], found["pooler_output"] = outputs.last_hidden_state, outputs.pooler_output
        if role == "owner":
            backbone = hf_vicreg.BigBirdViTBackbone.from_pretrained(encoder)  # by a folder, AutoBackbone has none
        else:
            backbone = AutoBackbone.from_pretrained(encoder, **trust)
        found["feature map"] = backbone(pixels).feature_maps[0]
        torch.manual_seed(0)
        detector = DetrForObjectDetection(
            DetrConfig(backbone_config=backbone.config, d_model=32, num_queries=3)
        ).eval()
        detector.model.backbone.model.load_state_dict(backbone.state_dict())
        found["feature map in DETR"] = detector.model.backbone.model(pixels).feature_maps[0]
        extract = pipeline("image-feature-extraction", model=encoder, image_processor=processor, device="cpu", **trust)
        found["pipeline"] = torch.tensor(extract(images()[0]))
        head = AutoModelForImageClassification.from_pretrained(classifier, **trust)
        found["logits"] = head(pixels).logits
        classify = pipeline("image-classification", model=classifier, image_processor=processor, device="cpu", **trust)
        answers = sorted(classify(images()[0]), key=lambda one: one["label"])
        assert [one["label"] for one in answers] == ["cat", "dog", "eel"]
        found["scores"] = torch.tensor([one["score"] for one in answers])
        painter = AutoModelForMaskedImageModeling.from_pretrained(encoder, **trust)  # its linear layer is a new one
        rows, columns = painter.config.grid_size(*pixels.shape[-2:])
        masked = (torch.arange(rows * columns) < 2).expand(len(pixels), -1)
        assert painter(pixels, bool_masked_pos=masked).loss > 0
        found["features of the painter"] = painter.bigbird_vit(pixels).pooler_output
        wrapper = AutoModelForPreTraining.from_pretrained(encoder, subfolder="pretraining", **trust).eval()
        views = torch.stack([pixels, pixels.flip(-1)], dim=1)
        found["embeddings"] = wrapper(pixel_values=views).embeddings
    module = type(model).__module__
    assert module.startswith("transformers_modules." if role == "stranger" else "hf_vicreg."), module
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, out)


if __name__ == "__main__":
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        load(**entry)
