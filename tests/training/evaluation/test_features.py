"""Features of any vision model, extracted once."""

import json
import logging
from io import BytesIO

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertModel,
    BitImageProcessor,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from hf_vicreg import BigBirdViTConfig, BigBirdViTForImageClassification, BigBirdViTModel, VicRegForPreTraining
from hf_vicreg.modeling.configuration_vicreg import VicRegConfig
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import load_vision_encoder
from hf_vicreg.training.evaluation.features import cache_key, load_features
from hf_vicreg.training.evaluation.labelled import LabelledImages
from hf_vicreg.training.images.sources import ImageSource

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SMALL_VIT = SMALL | {"image_size": 32, "patch_size": 8}
OURS = SMALL_VIT | {"tile_size": 1}


def picture(colour):
    buffer = BytesIO()
    Image.new("RGB", (40, 36), colour).save(buffer, "PNG")
    return buffer.getvalue()


ENCODED = [picture((20 * index, 255 - 20 * index, 7 * index)) for index in range(10)]


def split(encoded=ENCODED):
    source = ImageSource("few", len(encoded), encoded.__getitem__, "few", labels=[index % 2 for index in range(10)])
    return LabelledImages("train", source, ["even", "odd"])


@pytest.fixture
def models(tmp_path):
    """Folders of models of several makers."""
    ViTModel(ViTConfig(**SMALL_VIT)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    ViTForImageClassification(ViTConfig(**SMALL_VIT)).save_pretrained(tmp_path / "vit_classifier")
    dinov2 = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    Dinov2Model(dinov2).save_pretrained(tmp_path / "dinov2")
    BitImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "dinov2"
    )
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).save_pretrained(
        tmp_path / "resnet"
    )
    BigBirdViTModel(BigBirdViTConfig(**OURS)).save_pretrained(tmp_path / "ours")
    BigBirdViTForImageClassification(BigBirdViTConfig(**OURS)).save_pretrained(tmp_path / "our_classifier")
    wrapper = VicRegForPreTraining(VicRegConfig(encoder=BigBirdViTConfig(**OURS), expander_sizes=[8, 8]))
    wrapper.save_pretrained(tmp_path / "wrapper")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("vit", "pooler_output"),
        ("vit_classifier", "first token"),
        ("dinov2", "pooler_output"),
        ("resnet", "pooler_output"),
        ("ours", "pooler_output"),
        ("our_classifier", "pooler_output"),
        ("wrapper", "pooler_output"),
    ],
)
def test_models_of_any_maker_give_features(models, tmp_path, name, feature):
    encoder = load_vision_encoder(str(models / name))
    assert encoder.feature == feature
    assert encoder.name == name
    features = load_features(split(), encoder, tmp_path / "cache", 4)
    assert features.values.shape == (10, 16)
    assert features.labels.tolist() == [0, 1] * 5
    # one by one, and by hand
    images = [Image.open(BytesIO(one)) for one in ENCODED]
    pixels = torch.cat([encoder.processor(image, return_tensors="pt")["pixel_values"] for image in images])
    with torch.no_grad():
        outputs = encoder.model(pixel_values=pixels)
    expected = outputs.last_hidden_state[:, 0] if feature == "first token" else outputs.pooler_output.flatten(1)
    torch.testing.assert_close(features.values, expected, rtol=1e-4, atol=1e-5)


def test_features_are_extracted_once_for_model_data_and_preprocessing(models, tmp_path, caplog):
    encoder, images, cache = load_vision_encoder(str(models / "ours")), split(), tmp_path / "cache"
    first = load_features(images, encoder, cache, 4)
    (file,) = cache.iterdir()
    assert torch.equal(load_file(file)["features"], first.values)
    written = file.stat().st_mtime_ns
    with caplog.at_level(logging.INFO, logger="hf_vicreg"):
        again = load_features(images, load_vision_encoder(str(models / "ours")), cache, 8)
    assert f"found in {file}" in caplog.text
    assert torch.equal(again.values, first.values)
    assert file.stat().st_mtime_ns == written

    keys = {cache_key(images, encoder), cache_key(split(ENCODED[::-1]), encoder)}
    keys.add(cache_key(images, load_vision_encoder(str(models / "vit"))))
    settings = json.loads((models / "ours" / "config.json").read_text())
    (models / "ours" / "config.json").write_text(json.dumps(settings | {"num_random_blocks": 1}))
    keys.add(cache_key(images, load_vision_encoder(str(models / "ours"))))
    encoder.processor.save_pretrained(models / "ours")
    sized = json.loads((models / "ours" / "preprocessor_config.json").read_text())
    sized["size"] = {"height": 24, "width": 24}
    (models / "ours" / "preprocessor_config.json").write_text(json.dumps(sized))
    keys.add(cache_key(images, load_vision_encoder(str(models / "ours"))))
    with torch.no_grad():
        next(encoder.model.parameters()).add_(1)
    encoder.model.save_pretrained(models / "ours")
    keys.add(cache_key(images, load_vision_encoder(str(models / "ours"))))
    assert len(keys) == 6


def test_damaged_cache_is_made_again_and_corrupt_images_left_out(models, tmp_path, caplog):
    encoder, cache = load_vision_encoder(str(models / "ours")), tmp_path / "cache"
    images = split([b"broken", *ENCODED[1:]])
    first = load_features(images, encoder, cache, 4)
    assert first.indices.tolist() == list(range(1, 10))
    assert first.labels.tolist() == [1, 0] * 4 + [1]
    assert "1 of 10 images are corrupt and left out" in caplog.text
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    assert torch.equal(load_features(images, encoder, cache, 4).values, first.values)
    assert "damaged and made again" in caplog.text
    with pytest.raises(InputError, match="expected readable images in few, none of 10 can be read; "):
        load_features(split([b"broken"] * 10), encoder, cache, 4)


def test_models_without_a_vision_encoder_get_one_line(tmp_path):
    bert = BertConfig(vocab_size=10, max_position_embeddings=8, **SMALL)
    BertModel(bert).save_pretrained(tmp_path / "bert")
    tower = SMALL | {"projection_dim": 8}
    clip = CLIPConfig(
        text_config=tower | {"vocab_size": 10, "bos_token_id": 0, "eos_token_id": 1},
        vision_config=tower | {"image_size": 32, "patch_size": 8},
    )
    CLIPModel(clip).save_pretrained(tmp_path / "clip")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("bert", "expected a vision encoder, got a model of type 'bert', whose input is `input_ids`"),
        ("clip", "expected a vision encoder, got a model of type 'clip', whose input is `input_ids`"),
        ("empty", "expected the folder or Hub id of a vision model in safetensors form"),
    ):
        with pytest.raises(InputError) as caught:
            load_vision_encoder(str(tmp_path / name))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_missing_weights_are_refused(models):
    tensors = load_file(models / "ours" / "model.safetensors")
    from safetensors.torch import save_file

    del tensors[next(key for key in tensors if "layers.1" in key or "layer.1" in key)]
    save_file(tensors, models / "ours" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="expected weights for the whole encoder"):
        load_vision_encoder(str(models / "ours"))
