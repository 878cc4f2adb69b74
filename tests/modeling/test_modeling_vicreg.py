"""The wrapper: any encoder, two views, saving and continuing."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForPreTraining,
    BertConfig,
    ConvNextConfig,
    Dinov2Config,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
)

from hf_vicreg import VicRegConfig, VicRegForPreTraining, vicreg_loss
from hf_vicreg.modeling.modeling_vicreg import has_batch_norm, normalises_by_process

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
        Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8),
        id="dinov2",
    ),
    pytest.param(
        ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"), id="resnet"
    ),
    pytest.param(ConvNextConfig(num_stages=2, hidden_sizes=[16, 32], depths=[1, 1]), id="convnext"),
    pytest.param(
        SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4),
        id="swin",
    ),
]
RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 1], layer_type="basic")


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


def two_branches(**changes):
    settings = {"encoder": RESNET, "second_encoder": TINY, "expander_sizes": [24, 40]}
    return VicRegForPreTraining(VicRegConfig(**settings | changes))


def test_two_branches_of_different_kinds_share_nothing(tmp_path):
    weights = {"variance_weight": [20.0, 10.0], "covariance_weight": [1.0, 0.5], "convention": "solo-learn"}
    model = two_branches(second_expander_sizes=[48, 40], **weights).train()
    views = torch.randn(6, 2, 3, 32, 32)
    outputs = model(pixel_values=views)
    assert [tuple(one.shape) for one in outputs.representations] == [(6, 24), (6, 32)]
    assert outputs.embeddings.shape == (6, 2, 40)
    assert torch.equal(outputs.loss, vicreg_loss(*outputs.embeddings.unbind(1), **weights).loss)
    outputs.loss.backward()
    for branch in (model.encoder, model.expander, model.second_encoder, model.second_expander):
        assert all(one.grad is not None for one in branch.parameters() if one.numel())
    # each branch sees one view: what the other sees changes nothing in it
    model.eval()
    changed = views.clone()
    changed[:, 0] += 1
    with torch.no_grad():
        one, other = (model(pixel_values=each).embeddings for each in (views, changed))
    assert torch.equal(one[:, 1], other[:, 1])
    assert not torch.equal(one[:, 0], other[:, 0])

    model.save_pretrained(tmp_path)
    again = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert again.config.second_encoder.model_type == "bigbird_vit"
    assert torch.equal(again(pixel_values=views).loss, model(pixel_values=views).loss)


def test_second_branch_may_take_other_inputs():
    model = two_branches().train()
    first, second = torch.randn(6, 3, 32, 32), torch.randn(6, 3, 48, 40)
    loss = model(pixel_values=first, second_inputs={"pixel_values": second}).loss
    same = torch.randn(6, 2, 3, 32, 32)
    vit = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    other_size = {"pixel_values": second, "interpolate_pos_encoding": True}
    assert two_branches(second_encoder=vit)(pixel_values=first, second_inputs=other_size).loss.isfinite()
    model.eval()
    expected = model(pixel_values=same).loss
    assert torch.equal(model(pixel_values=same[:, 0], second_inputs={"pixel_values": same[:, 1]}).loss, expected)
    # or be of another modality
    text = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = two_branches(second_encoder=text).train()
    tokens = {"input_ids": torch.randint(0, 30, (6, 5)), "attention_mask": torch.ones(6, 5, dtype=torch.long)}
    loss = model(pixel_values=first, second_inputs=tokens).loss
    loss.backward()
    assert model.second_encoder.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    for call, message in (
        ({"pixel_values": same, "second_inputs": tokens}, "expected .batch, channels, height, width. beside"),
        ({"pixel_values": first}, "2 views"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**call)
    with pytest.raises(ValueError, match="`second_inputs`: expected a `second_encoder`"):
        VicRegForPreTraining(VicRegConfig(encoder=TINY, expander_sizes=[8]))(first, second_inputs=tokens)


# Swin's windows are fixed to its own image size: a stage smaller than a window fails upstream
@pytest.mark.parametrize("encoder", [one for one in ENCODERS if one.id != "swin"])
def test_local_views_are_smaller_ones_of_the_same_encoder(encoder):
    model = VicRegForPreTraining(VicRegConfig(encoder=encoder, expander_sizes=[24, 40])).eval()
    views, local = torch.randn(4, 2, 3, 32, 32), torch.randn(4, 3, 3, 16, 16)
    outputs = model(pixel_values=views, local_pixel_values=local)
    assert outputs.embeddings.shape == (4, 5, 40)
    assert outputs.representations.shape == (4, 5, 32)
    z = outputs.embeddings.unbind(1)
    assert torch.equal(outputs.loss, vicreg_loss(*z[:2], local_views=z[2:]).loss)
    # each view's features are its own, whatever goes through the encoder beside it
    torch.testing.assert_close(outputs.embeddings[:, :2], model(pixel_values=views).embeddings, atol=1e-5, rtol=1e-5)
    again = model(pixel_values=views, local_pixel_values=local[:, [2, 0, 1]])
    torch.testing.assert_close(again.embeddings[:, 3], outputs.embeddings[:, 2], atol=1e-5, rtol=1e-5)
    model.train()(pixel_values=views, local_pixel_values=local).loss.backward()


def test_one_forward_of_the_encoder_for_each_resolution():
    model = VicRegForPreTraining(VicRegConfig(encoder=TINY, expander_sizes=[24, 40]))
    seen = []
    model.encoder.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    model(pixel_values=torch.randn(4, 2, 3, 32, 32), local_pixel_values=torch.randn(4, 3, 3, 16, 16))
    assert [tuple(one["pixel_values"].shape) for one in seen] == [(8, 3, 32, 32), (12, 3, 16, 16)]
    # local views have a smaller grid and a pattern of their own, made once
    patterns = [model.encoder.attention_pattern(side, side) for side in (32, 16, 16)]
    assert [pattern.grid for pattern in patterns] == [(4, 4), (2, 2), (2, 2)]
    assert patterns[1] is patterns[2]


def test_a_batch_may_go_through_encoder_and_loss_in_two_calls():
    model = VicRegForPreTraining(VicRegConfig(encoder=TINY, expander_sizes=[24, 40])).train()
    views = torch.randn(4, 2, 3, 32, 32)
    whole = model(pixel_values=views)
    encoded = model(pixel_values=views, return_loss=False)
    assert encoded.to_tuple()[0].shape == (4, 2, 32)
    assert len(encoded) == 1
    assert torch.equal(model(representations=encoded.representations).loss, whole.loss)
    both = two_branches().train()
    encoded = both(pixel_values=views, return_loss=False).representations
    assert torch.equal(both(representations=encoded).loss, both(pixel_values=views).loss)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_pretrained_encoders_are_taken_along(encoder, tmp_path):
    source = VicRegForPreTraining(VicRegConfig(encoder=encoder, expander_sizes=[8])).encoder
    source.save_pretrained(tmp_path)
    model = VicRegForPreTraining.from_encoder_pretrained(tmp_path, expander_sizes=[24, 40], convention="paper")
    assert model.config.convention == "paper"
    assert model.second_encoder is None
    both = VicRegForPreTraining.from_encoder_pretrained(tmp_path, tmp_path, expander_sizes=[24, 40])
    for own in (model.encoder, both.encoder, both.second_encoder):
        assert all(torch.equal(tensor, own.state_dict()[name]) for name, tensor in source.state_dict().items())
    assert both.encoder is not both.second_encoder
    assert model.expander.output.weight.shape == (40, 24)
    with pytest.raises(OSError, match="nowhere"):
        VicRegForPreTraining.from_encoder_pretrained(tmp_path / "nowhere")


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
    "given",
    [torch.zeros(4, 32), [torch.zeros(4, 32)], torch.zeros(4, 2, 31), [torch.zeros(4, 32), torch.zeros(3, 32)], []],
    ids=["no-views", "one-view", "width", "batch", "none"],
)
def test_bad_representations_are_named(given):
    model = VicRegForPreTraining(VicRegConfig(encoder=TINY, expander_sizes=[24, 40]))
    with pytest.raises(ValueError, match="`representations`: expected what an earlier call returned"):
        model(representations=given)
    with pytest.raises(ValueError, match="`representations`: expected no images beside them"):
        model(pixel_values=torch.zeros(4, 2, 3, 32, 32), representations=torch.zeros(4, 2, 32))


def test_bad_local_views_are_named():
    model = VicRegForPreTraining(VicRegConfig(encoder=TINY, expander_sizes=[24, 40]))
    views = torch.zeros(4, 2, 3, 32, 32)
    for local in (torch.zeros(4, 3, 16, 16), torch.zeros(3, 2, 3, 16, 16)):
        with pytest.raises(ValueError, match=r"`local_pixel_values`: expected .batch, local views, .* got"):
            model(pixel_values=views, local_pixel_values=local)
    with pytest.raises(ValueError, match="`local_pixel_values`: expected one encoder"):
        two_branches()(pixel_values=views, local_pixel_values=torch.zeros(4, 2, 3, 16, 16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expander_sizes": []}, "expander_sizes"),
        ({"variance_weight": -1.0}, "`variance_weight`"),
        ({"expander_norm": "x"}, "expander_norm"),
        ({"eps": 0.0}, "`eps`: expected a number above 0"),
        ({"encoder": 3}, "`encoder`: expected a configuration or its fields, got int"),
        ({"second_encoder": 3}, "`second_encoder`: expected a configuration or its fields, got int"),
        ({"covariance_weight": [1.0, -1.0]}, "`covariance_weight`: expected a number of at least 0, got -1"),
        ({"variance_weight": [1.0]}, "`variance_weight`: expected a number or one for each of 2 views"),
        ({"convention": "mine"}, "convention"),
        ({"second_expander_sizes": [8]}, "`second_expander_sizes`: expected a `second_encoder` as well"),
        (
            {"second_encoder": TINY, "expander_sizes": [24, 40], "second_expander_sizes": [24, 48]},
            "`second_expander_sizes`: expected embeddings as wide as the first branch's, 40, got 48",
        ),
    ],
    ids=[
        "no-expander",
        "negative-weight",
        "unknown-norm",
        "no-eps",
        "no-encoder",
        "no-second-encoder",
        "negative-of-two",
        "one-of-two",
        "convention",
        "one-branch",
        "widths-differ",
    ],
)
def test_bad_configurations_are_named(changes, message):
    with pytest.raises(Exception, match=message):
        VicRegConfig(**{"encoder": TINY} | changes)


def test_synchronised_batch_norms_see_the_whole_batch():
    config = {"model_type": "resnet", "hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8}
    model = VicRegForPreTraining(VicRegConfig(encoder=config, expander_sizes=[8]))
    assert normalises_by_process(model.encoder)
    synchronised = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model.encoder)
    assert not normalises_by_process(synchronised)
    assert has_batch_norm(synchronised)  # its output still depends on the others of the batch
