"""What a card says of a model of images and texts, and nothing else."""

from collections.abc import Iterator
from typing import Any

from hf_vicreg.model_cards.results import figure

DUAL_TYPE = "vicreg_dual_encoder"
DUAL_IMPORTS = "from transformers import AutoModel, AutoProcessor, pipeline"
DUAL_CODE = """\
find = pipeline("zero-shot-image-classification", model=name, trust_remote_code=True)
labels = find(images, candidate_labels=["a flag", "a face"], hypothesis_template="{}")  # likeliest first
model = AutoModel.from_pretrained(name, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
inputs = processor(images=images, text=["a flag", "a face"], padding=True, return_tensors="pt")
logits = model(**inputs).logits_per_image  # (images, texts)"""
DUAL_LOCAL_CODE = "import hf_vicreg\n" + DUAL_CODE.replace(", trust_remote_code=True", "")
ROWS = (
    ("image_to_text", "captions found by an image"),
    ("text_to_image", "images found by a caption"),
)


def retrieval_table(results: dict[str, Any]) -> Iterator[str]:
    """Yield lines of the table of the run's own retrieval on images and captions kept apart."""
    found = results.get("image_text") or {}
    yield "| held-out images and captions | recall at 1 | at 5 | at 10 | median rank |"
    yield "| --- | --- | --- | --- | --- |"
    for key, words in ROWS:
        recalls = " | ".join(figure(found, f"{key}_recall_{count}", ".3f") for count in (1, 5, 10))
        yield f"| {words} | {recalls} | {figure(found, f'{key}_median_rank', 'g')} |"
    yield ""
