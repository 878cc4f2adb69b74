"""The captioner: tokens of any text, samples, what is refused, and that captions are learned from images."""

import datasets
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTImageProcessor, ViTModel

from hf_vicreg import BigBirdViTConfig, BigBirdViTImageProcessor, BigBirdViTModel
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.tasks.arguments import CaptioningArguments
from hf_vicreg.training.tasks.captioning.command import finetune_captioning
from hf_vicreg.training.tasks.captioning.data import (
    IGNORED,
    CaptionedViews,
    caption_tokens,
    collate,
    label_inputs,
    load_captioning,
    model_inputs,
)
from hf_vicreg.training.tasks.captioning.model import build_captioner, build_tokenizer

CAPTIONS = ["a red wall", "a blue, very blue wall"]
COLOURS = [(220, 40, 40), (40, 40, 220)]


@pytest.fixture
def encoder(tmp_path):
    folder = tmp_path / "encoder"
    config = BigBirdViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        tile_size=1,
    )
    BigBirdViTModel(config).save_pretrained(folder)
    BigBirdViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def arguments(tmp_path):
    """Returns a function from captions of 8 walls, red and blue in turn, and flags, to the flags of a dataset."""

    def make(captions=CAPTIONS * 4, **flags):
        images = [Image.new("RGB", (36, 36), COLOURS[number % 2]) for number in range(len(captions))]
        split = datasets.Dataset.from_dict({"image": images, "text": captions})
        split = split.cast_column("image", datasets.Image())
        datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "data")
        small = {"decoder_hidden_size": 32, "decoder_layers": 1, "output_dir": str(tmp_path / "out")}
        return CaptioningArguments(dataset_name=str(tmp_path / "data"), **small | flags)

    return make


def test_any_text_survives_the_tokenizer():
    tokenizer = build_tokenizer(CAPTIONS, 300)
    for text in [*CAPTIONS, "Ein grüner Würfel, 30 €", "猫が二匹 🐈"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert 262 < len(tokenizer) <= 300
    known, other = caption_tokens(tokenizer, ["a red wall", "猫"], 64)
    assert len(known) <= 4  # words of the captions are tokens
    assert known[-1] == other[-1] == tokenizer.eos_token_id
    (cut,) = caption_tokens(tokenizer, ["猫が二匹" * 20], 10)
    assert len(cut) == 10
    assert cut[-1] == tokenizer.eos_token_id


def test_samples_are_images_with_their_captions(arguments, encoder):
    flags = arguments(flip_probability=0.5)
    train, _ = load_captioning(flags)
    tokenizer = build_tokenizer(train.annotations, flags.vocab_size)
    model, processor = build_captioner(encoder, tokenizer, flags)
    views = CaptionedViews(train, tokenizer, processor, flags)
    inputs = model_inputs(processor, collate([views[3, 0], views[3, 1]]), torch.device("cpu"))
    expected = processor([Image.new("RGB", (36, 36), colour) for colour in COLOURS], return_tensors="pt")
    assert torch.allclose(inputs["pixel_values"], expected["pixel_values"], atol=1e-5)  # no crop changes a plain wall
    assert inputs["labels"][0].tolist()[-1] == IGNORED
    for labels, caption in zip(inputs["labels"], CAPTIONS, strict=True):
        assert tokenizer.decode(labels[labels >= 0], skip_special_tokens=True) == caption
    loss = model.eval()(**inputs).loss
    loss.backward()
    assert not [name for name, one in model.named_parameters() if one.grad is None]
    inputs |= label_inputs(torch.nn.functional.pad(inputs["labels"], (0, 3), value=IGNORED))
    assert model(**inputs).loss.item() == pytest.approx(loss.item(), rel=1e-5)  # padding does not count


def test_captions_are_learned_from_images(arguments, encoder):
    flags = arguments(max_steps=60, learning_rate=5e-3, encoder_learning_rate_ratio=1, logging_steps=60)
    record = finetune_captioning(encoder, flags)
    assert record["metrics"]["exact_match"] == 1
    assert record["metrics"]["loss"] < 0.2
    assert record["details"]["most_frequent_caption"]["share"] == 0.5
    assert [sample["written"] for sample in record["details"]["samples"]] == CAPTIONS * 4


@pytest.mark.parametrize("caption", [None, "", "  "], ids=["none", "empty", "blank"])
def test_a_missing_caption_is_refused(caption, arguments):
    with pytest.raises(InputError, match="`text_column_name`: expected a caption for each image") as caught:
        load_captioning(arguments(["a red wall", caption]))
    assert "in row 1 of 'train'" in str(caught.value)


def test_encoders_of_others(arguments, tmp_path):
    flags = arguments(decoder_hidden_size=64, from_scratch=True)
    tokenizer = build_tokenizer(CAPTIONS, 300)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(image_size=32, patch_size=16, **sizes)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    model, _ = build_captioner(str(tmp_path / "vit"), tokenizer, flags)
    assert model.generate(torch.randn(2, 3, 32, 32)).shape[0] == 2
    assert "/" not in model.config.encoder.name_or_path
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(tmp_path / "resnet")
    with pytest.raises(
        InputError, match="expected an encoder that returns tokens, as ViTs do, got one of type 'resne"
    ):
        build_captioner(str(tmp_path / "resnet"), tokenizer, flags)
