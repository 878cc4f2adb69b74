"""The wrapper: any encoder, two views, saving and continuing."""

import pytest
import torch
from transformers import AutoModel, AutoModelForPreTraining, ResNetConfig, ViTConfig

from hf_vicreg import VicRegConfig, VicRegForPreTraining, vicreg_loss

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "tile_size": 1,
}
ENCODERS = [
    pytest.param(TINY, id="bigbird-vit"),
    pytest.param(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=32,
            patch_size=8,
        ),
        id="vit",
    ),
    pytest.param(
        ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"), id="resnet"
    ),
]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_any_encoder_trains_and_round_trips(encoder, tmp_path):
    model = VicRegForPreTraining(VicRegConfig(encoder=encoder, expander_sizes=[24, 40]))
    pixel_values = torch.randn(6, 2, 3, 32, 32)
    outputs = model.train()(pixel_values=pixel_values)
    assert outputs.embeddings.shape == (6, 2, 40)
    assert outputs.representations.shape == (6, 2, 32)
    expected = vicreg_loss(*outputs.embeddings.unbind(1))
    assert torch.equal(outputs.loss, expected.loss)
    outputs.loss.backward()
    assert all(one.grad is not None for one in model.expander.parameters())

    model.eval().save_pretrained(tmp_path)
    again = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert again.config.encoder.model_type == model.config.encoder.model_type
    assert torch.equal(again(pixel_values=pixel_values).loss, model(pixel_values=pixel_values).loss)
    model.encoder.save_pretrained(tmp_path / "encoder")
    alone = AutoModel.from_pretrained(tmp_path / "encoder")
    assert type(alone) is type(model.encoder)


def test_expander_is_the_papers():
    expander = VicRegForPreTraining(VicRegConfig(encoder=TINY, expander_sizes=[64, 48, 40])).expander
    shapes = [tuple(one.weight.shape) for one in [*expander.hidden, expander.output]]
    assert shapes == [(64, 32), (48, 64), (40, 48)]
    assert expander.output.bias is None
    assert [type(one).__name__ for one in expander.norm] == ["GlobalBatchNorm1d"] * 2


def test_weights_of_the_loss_are_the_configurations():
    weights = {
        "invariance_weight": 3.0,
        "variance_weight": 5.0,
        "covariance_weight": 0.5,
        "gamma": 2.0,
        "eps": 1e-2,
    }
    model = VicRegForPreTraining(VicRegConfig(encoder=TINY, expander_sizes=[24, 40], **weights)).train()
    outputs = model(pixel_values=torch.randn(6, 2, 3, 32, 32))
    assert torch.equal(outputs.loss, vicreg_loss(*outputs.embeddings.unbind(1), **weights).loss)


def test_expander_starts_from_torchs_default_and_the_encoder_from_its_own():
    model = VicRegForPreTraining(VicRegConfig(encoder=TINY | {"initializer_range": 0.06}, expander_sizes=[512, 512]))
    assert model.expander.output.weight.std().item() == pytest.approx((1 / (3 * 512)) ** 0.5, rel=0.02)
    assert model.encoder.encoder.layer[0].mlp.fc1.weight.std().item() == pytest.approx(0.06, rel=0.15)


def test_views_are_normalised_apart():
    # BatchNorm statistics of the two views joined would differ where the views differ
    model = VicRegForPreTraining(VicRegConfig(encoder=TINY, expander_sizes=[24, 40])).train()
    views = torch.randn(6, 2, 3, 32, 32)
    views[:, 1] *= 3
    embeddings = model(pixel_values=views).embeddings
    with torch.no_grad():
        alone = model.expander(model.encoder(views[:, 1]).pooler_output)
    torch.testing.assert_close(embeddings[:, 1], alone)


@pytest.mark.parametrize(
    ("pixel_values", "message"),
    [
        (None, "`pixel_values`: expected .batch, 2 views"),
        (torch.zeros(4, 3, 32, 32), "2 views"),
        (torch.zeros(1, 2, 3, 32, 32), "at least 2 samples for a covariance"),
    ],
    ids=["none", "one-view", "one-sample"],
)
def test_bad_inputs_are_named(pixel_values, message):
    model = VicRegForPreTraining(VicRegConfig(encoder=TINY, expander_sizes=[24, 40]))
    with pytest.raises(ValueError, match=message):
        model(pixel_values=pixel_values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expander_sizes": []}, "expander_sizes"),
        ({"variance_weight": -1.0}, "`variance_weight`"),
        ({"expander_norm": "x"}, "expander_norm"),
        ({"eps": 0.0}, "`eps`: expected a number above 0"),
        ({"encoder": 3}, "`encoder`: expected a configuration or its fields, got int"),
    ],
    ids=["no-expander", "negative-weight", "unknown-norm", "no-eps", "no-encoder"],
)
def test_bad_configurations_are_named(changes, message):
    with pytest.raises(Exception, match=message):
        VicRegConfig(**{"encoder": TINY} | changes)
