"""Classifier and backbone: what they return, in which order, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoBackbone, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

from hf_vicreg import (
    BigBirdViTBackbone,
    BigBirdViTConfig,
    BigBirdViTForImageClassification,
    BigBirdViTModel,
    VicRegConfig,
    VicRegForPreTraining,
)
from hf_vicreg.modeling import bigbird_attention

CLASSES = (BigBirdViTModel, BigBirdViTForImageClassification, BigBirdViTBackbone)
POSITIONS = ("rope", "absolute")
# ours, or that of releases of transformers which check it first
PROBLEM_TYPE = "`problem_type`: expected one of .* got 'foo'|'problem_type' with value 'foo' doesn't match any type"
STAGES = ["stem", "stage1", "stage3"]


def tiny_config(**changes):
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 64,
        "patch_size": 8,
        "tile_size": 2,
        "num_random_blocks": 1,
        "num_register_tokens": 2,
        "initializer_range": 0.2,
        "num_labels": 5,
    }
    return BigBirdViTConfig(**settings | changes)


def main_output(outputs):
    return outputs.feature_maps[0] if "feature_maps" in outputs else outputs[0]


@pytest.fixture
def blocks(monkeypatch):
    """Makes `sdpa` compute blocks whatever the grid."""
    monkeypatch.setattr(bigbird_attention, "PAIR_COST", 0)
    monkeypatch.setattr(bigbird_attention, "TILE_COST", 0)


@pytest.mark.parametrize("layout", ["tiles", "raster"])
@pytest.mark.parametrize("position", POSITIONS)
def test_a_patch_stays_where_it_is(position, layout):
    # without layers that mix tokens, a changed patch changes its own place in everything returned, and no other
    config = tiny_config(
        num_hidden_layers=1,
        position_embedding_type=position,
        attention_layout=layout,
        block_size=6,
        out_features=["stem", "stage1"],
        apply_layernorm=False,
    )
    models = [BigBirdViTModel(config).eval(), BigBirdViTBackbone(config).eval()]
    for model in models:
        torch.nn.init.zeros_(model.encoder.layer[0].attention.o_proj.weight)
    pixel_values = torch.randn(1, 3, 7 * 8, 13 * 8)
    changed = pixel_values.clone()
    changed[..., 5 * 8 : 6 * 8, 11 * 8 : 12 * 8] += 1.0
    for model in models:
        before, after = (model(one, output_hidden_states=True) for one in (pixel_values, changed))
        for one, other in zip(before.hidden_states, after.hidden_states, strict=True):
            moved = (one - other)[0, 3:].abs().sum(-1).view(7, 13) > 1e-6
            assert moved.nonzero().tolist() == [[5, 11]]
    assert len(after.feature_maps) == 2
    for one, other in zip(before.feature_maps, after.feature_maps, strict=True):
        assert one.shape == (1, 32, 7, 13)
        assert ((one - other)[0].abs().sum(0) > 1e-6).nonzero().tolist() == [[5, 11]]


@pytest.mark.parametrize("layout", ["tiles", "raster"])
@pytest.mark.parametrize("normed", [True, False], ids=["layernorm", "plain"])
@pytest.mark.parametrize("maps", [True, False], ids=["maps", "tokens"])
def test_backbone_returns_the_encoders_states(maps, normed, layout):
    settings = {"attention_layout": layout, "block_size": 6, "num_global_tiles": 1}
    encoder = BigBirdViTModel(tiny_config(**settings)).eval()
    config = tiny_config(out_features=STAGES, apply_layernorm=normed, reshape_hidden_states=maps, **settings)
    backbone = AutoBackbone.from_config(config).eval()
    backbone.load_state_dict(encoder.state_dict())
    pixel_values = torch.randn(2, 3, 56, 104)
    states = encoder(pixel_values, output_hidden_states=True).hidden_states
    found = backbone(pixel_values, output_hidden_states=True)
    assert all(torch.equal(one, other) for one, other in zip(found.hidden_states, states, strict=True))
    assert backbone(pixel_values).hidden_states is None
    for one, stage in zip(found.feature_maps, (0, 1, 3), strict=True):
        expected = encoder.layernorm(states[stage]) if normed else states[stage]
        if maps:
            expected = expected[:, 3:].mT.reshape(2, 32, 7, 13)
        else:
            expected = torch.cat([expected[:, :1], expected[:, 3:]], dim=1)
        assert torch.equal(one, expected)
    if normed and not maps:
        last = encoder(pixel_values).last_hidden_state
        assert torch.equal(found.feature_maps[-1][:, 1:], last[:, 3:])


def test_backbones_stages_by_name_and_by_number():
    assert BigBirdViTConfig(num_hidden_layers=2).out_features == ["stage2"]
    assert tiny_config(out_indices=[0, 3]).out_features == ["stem", "stage3"]
    backbone = BigBirdViTBackbone(tiny_config(out_features=STAGES))
    assert backbone.channels == [32, 32, 32]
    assert backbone.num_features == [32] * 4
    with pytest.raises(ValueError, match=r"out_features must be a subset of stage_names.*'stage3'.* got .*'stage9'"):
        tiny_config(out_features=["stage9"])
    with pytest.raises(ValueError, match=r"out_indices must be valid indices.*got .*9"):
        tiny_config(out_indices=[9])


def test_stages_follow_the_number_of_layers():
    config = BigBirdViTConfig(num_hidden_layers=4, out_features=["stage1", "stage2", "stage4"])
    config.num_hidden_layers = 2
    assert (config.out_features, config.out_indices) == (["stage1", "stage2"], [1, 2])
    config.num_hidden_layers = 3
    assert config.out_features == ["stage1", "stage2"]
    config = BigBirdViTConfig(num_hidden_layers=4, out_features=["stage3"])
    config.num_hidden_layers = 1
    assert config.out_features == ["stage1"]
    BigBirdViTBackbone(tiny_config(num_hidden_layers=4, out_features=["stage3"]))


def test_a_backbone_of_fewer_layers_loads(tmp_path):
    BigBirdViTBackbone(tiny_config(num_hidden_layers=3, out_features=["stage1", "stage3"])).save_pretrained(tmp_path)
    model = BigBirdViTBackbone.from_pretrained(tmp_path, num_hidden_layers=2)
    assert len(model(torch.zeros(1, 3, 32, 32)).feature_maps) == 1


@pytest.mark.parametrize("layers", [2, 5])
def test_stages_follow_the_layers(layers, tmp_path):
    BigBirdViTModel(tiny_config()).save_pretrained(tmp_path / "three")
    pixel_values = torch.randn(1, 3, 64, 64)
    for model_class in (BigBirdViTModel, BigBirdViTBackbone):
        model = model_class.from_pretrained(tmp_path / "three", num_hidden_layers=layers)
        assert model.config.stage_names[-1] == model.config.out_features[0] == f"stage{layers}"
        model.save_pretrained(tmp_path / "other")
        again = model_class.from_pretrained(tmp_path / "other")
        assert torch.equal(main_output(again(pixel_values)), main_output(model.eval()(pixel_values)))
    saved = tiny_config(out_features=["stage1"]).to_dict()
    assert BigBirdViTConfig.from_dict(saved | {"num_hidden_layers": layers}).out_features == ["stage1"]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("model_class", CLASSES, ids=lambda one: one.__name__)
def test_implementations_are_switched_and_back(model_class, position, blocks):
    model = model_class(tiny_config(position_embedding_type=position)).eval()
    pixel_values = torch.randn(2, 3, 56, 104)
    with torch.no_grad():
        expected = main_output(model(pixel_values))
        for name in ("eager", "flex_attention", "sdpa", "eager", "sdpa"):
            model.set_attn_implementation(name)
            torch.testing.assert_close(main_output(model(pixel_values)), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(main_output(model(pixel_values)), expected)
        model.set_attn_implementation("eager")
        attentions = model(pixel_values, output_attentions=True).attentions
    assert [one.shape for one in attentions] == [(2, 4, 94, 94)] * 3
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(2, 4, 94))
    if model_class is not BigBirdViTForImageClassification:
        # in raster order: a patch sees the patches of the tiles that its own tile sees, whatever the layers' order
        neighbours = model.attention_pattern(56, 104).neighbours[0]  # of 4x7 tiles, the last of each line partial
        row, column = torch.arange(7), torch.arange(13)
        tile = (row[:, None] // 2 * 7 + column // 2).flatten()
        expected = torch.stack([torch.isin(tile, neighbours[one]) for one in tile])
        assert 0.2 < expected.float().mean() < 0.8
        assert torch.equal(attentions[0][0, 0, 3:, 3:] > 0, expected)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_changes_nothing_for_absolute_positions(pooling):
    config = tiny_config(attention_type="original_full", position_embedding_type="absolute", pooling=pooling)
    model = BigBirdViTModel(config).double().eval()
    image = torch.randn(1, 3, 24, 40, dtype=torch.float64)
    canvas, mask = torch.randn(1, 3, 56, 64, dtype=torch.float64), torch.zeros(1, 56, 64)
    canvas[..., 16:40, 8:48], mask[:, 16:40, 8:48] = image, 1
    torch.testing.assert_close(model(canvas, pixel_mask=mask).pooler_output, model(image).pooler_output)
    backbone = BigBirdViTBackbone(config).double().eval()
    found = backbone(canvas, pixel_mask=mask).feature_maps[0][..., 2:5, 1:6]
    torch.testing.assert_close(found, backbone(image).feature_maps[0])


def test_absolute_positions_tell_permuted_patches_apart():
    pixel_values = torch.randn(1, 3, 64, 64)
    settings = {"attention_type": "original_full", "pooling": "cls"}
    for position, differs in (("absolute", True), ("rope", True), ("none", False)):
        model = BigBirdViTModel(tiny_config(position_embedding_type="absolute", **settings)).eval()
        if position == "rope":
            model = BigBirdViTModel(tiny_config(**settings)).eval()
        elif position == "none":
            torch.nn.init.zeros_(model.embeddings.position_embeddings)
        found, other = (model(one).pooler_output for one in (pixel_values, pixel_values.roll(8, 2)))
        assert ((found - other).abs().max() > 1e-3) == differs


def test_pooler_and_gated_mlp():
    model = BigBirdViTModel(tiny_config(pooler_act="tanh", use_swiglu_ffn=True, pooling="cls")).eval()
    outputs = model(torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(outputs.pooler_output, model.pooler.dense(outputs.last_hidden_state[:, 0]).tanh())
    mlp = model.encoder.layer[0].mlp
    states = torch.randn(2, 5, 32)
    expected = mlp.down_proj(F.silu(mlp.gate_proj(states)) * mlp.up_proj(states))
    torch.testing.assert_close(mlp(states), expected)
    assert BigBirdViTBackbone(tiny_config(pooler_act="tanh")).pooler is None


def test_dropping_paths_and_layer_scale_reach_the_heads():
    model = BigBirdViTForImageClassification(tiny_config(drop_path_rate=0.9, layerscale_value=0.5)).train()
    pixel_values = torch.randn(4, 3, 64, 64)
    assert not torch.equal(model(pixel_values).logits, model(pixel_values).logits)
    model.eval()
    assert torch.equal(model(pixel_values).logits, model(pixel_values).logits)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_classifier_reads_the_pooled_feature(pooling):
    model = BigBirdViTForImageClassification(tiny_config(pooling=pooling)).eval()
    pixel_values, labels = torch.randn(3, 3, 56, 104), torch.tensor([0, 4, -100])
    found = model(pixel_values, labels=labels)
    expected = model.classifier(model.bigbird_vit(pixel_values).pooler_output)
    assert torch.equal(found.logits, expected)
    torch.testing.assert_close(found.loss, F.cross_entropy(expected[:2], labels[:2]))
    summed = model(pixel_values, labels=labels, num_items_in_batch=4).loss  # Trainer's gradient accumulation
    torch.testing.assert_close(summed, F.cross_entropy(expected[:2], labels[:2], reduction="sum") / 4)
    assert model.config.problem_type is None


def test_classifier_of_several_labels_and_regression():
    pixel_values = torch.randn(3, 3, 64, 64)
    model = BigBirdViTForImageClassification(tiny_config()).eval()
    targets = torch.rand(3, 5).round()
    found = model(pixel_values, labels=targets)
    torch.testing.assert_close(found.loss, F.binary_cross_entropy_with_logits(found.logits, targets))
    assert model.config.problem_type == "multi_label_classification"
    model = BigBirdViTForImageClassification(tiny_config(num_labels=1)).eval()
    found = model(pixel_values, labels=targets[:, 0])
    torch.testing.assert_close(found.loss, F.mse_loss(found.logits[:, 0], targets[:, 0]))
    assert BigBirdViTForImageClassification(tiny_config(num_labels=0))(pixel_values).logits.shape == (3, 32)


@pytest.mark.parametrize("label", [5, -1, 7])
def test_labels_out_of_range_are_named(label):
    model = BigBirdViTForImageClassification(tiny_config())
    with pytest.raises(ValueError, match=rf"`labels`: expected 0 to 4 .*, got {label}\."):
        model(torch.randn(2, 3, 64, 64), labels=torch.tensor([0, label]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8])
def test_classes_may_be_any_integers(dtype):
    model, pixel_values = BigBirdViTForImageClassification(tiny_config()).eval(), torch.randn(2, 3, 64, 64)
    expected = model(pixel_values, labels=torch.tensor([1, 4])).loss
    assert torch.equal(model(pixel_values, labels=torch.tensor([[1], [4]], dtype=dtype)).loss, expected)


@pytest.mark.parametrize(
    ("problem_type", "labels", "message"),
    [
        (None, [1, 2], "`labels`: expected a tensor, got list"),
        (None, torch.tensor([1, 2, 3]), r"expected integers \(batch,\) for .*, got torch.int64 \(3,\) for 2 images"),
        (None, torch.ones(2, 5, dtype=torch.long), r"expected integers \(batch,\).* got torch.int64 \(2, 5\)"),
        (None, torch.ones(2), r"expected numbers \(2, 5\) for .*multi_label.*, got torch.float32 \(2,\)"),
        ("single_label_classification", torch.ones(2), r"expected integers \(batch,\) .* got torch.float32 \(2,\)"),
        ("regression", torch.ones(2), r"expected numbers \(2, 5\) for problem type 'regression'"),
    ],
    ids=["list", "batch", "one-hot", "floats", "single-floats", "regression"],
)
def test_labels_that_do_not_fit_are_named_and_change_nothing(problem_type, labels, message):
    model, pixel_values = BigBirdViTForImageClassification(tiny_config()).eval(), torch.randn(2, 3, 64, 64)
    model.config.problem_type = problem_type
    with pytest.raises(ValueError, match=message):
        model(pixel_values, labels=labels)
    assert model.config.problem_type == problem_type
    model.config.problem_type = "multi_label_classification"
    one_hot = torch.eye(5, dtype=torch.long)[:2]
    found, expected = (model(pixel_values, labels=one).loss for one in (one_hot, one_hot.float()))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("model_class", CLASSES, ids=lambda one: one.__name__)
def test_images_smaller_than_a_patch_are_named(model_class):
    with pytest.raises(ValueError, match=r"expected an image of at least one patch \(8, 8\).*got \(64, 7\)"):
        model_class(tiny_config())(torch.randn(1, 3, 64, 7))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooler_act": "foo"}, "`pooler_act`: expected an activation"),
        ({"image_size": 4, "position_embedding_type": "absolute"}, "`image_size`: expected at least one patch"),
        ({"position_embedding_type": "sinus"}, "position_embedding_type"),
        ({"problem_type": "foo"}, PROBLEM_TYPE),
        ({"hidden_size": 24}, "`hidden_size`: expected a multiple of 16 .* got 24"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_configurations_are_named(changes, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**changes)
    if "hidden_size" in changes:  # heads of 6 rotate no pairs of pairs, but may have learned positions
        tiny_config(position_embedding_type="absolute", **changes)


def test_another_process_loads_the_same_features(tmp_path, ranks):
    # every class, both positions, from a local folder through the Auto classes, bit for bit
    torch.save(torch.randn(2, 3, 56, 104), tmp_path / "pixels.pt")
    pixel_values = torch.load(tmp_path / "pixels.pt")
    features = {}
    for position in POSITIONS:
        config = tiny_config(
            position_embedding_type=position, out_features=STAGES, pooler_act="tanh", layerscale_value=0.1
        )
        for model_class in CLASSES:
            name = f"{model_class.__name__}-{position}"
            model = model_class(config).eval()
            model.save_pretrained(tmp_path / name)
            features[name] = main_output(model(pixel_values)).detach()
    wrapper = VicRegForPreTraining(VicRegConfig(encoder=tiny_config(), expander_sizes=[16, 16])).eval()
    wrapper.save_pretrained(tmp_path / "VicRegForPreTraining")
    features["VicRegForPreTraining"] = wrapper(torch.stack([pixel_values] * 2, 1)).representations.detach()
    torch.save(features, tmp_path / "features.pt")
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, torch, hf_vicreg\n"
        "os.chdir(sys.argv[1])\n"
        "torch.set_num_threads(int(sys.argv[2]))\n"
        "from transformers import AutoModel, AutoModelForImageClassification, AutoModelForPreTraining\n"
        "pixels, features = torch.load('pixels.pt'), torch.load('features.pt')\n"
        "for name, expected in features.items():\n"
        "    if name.startswith('VicReg'):\n"
        "        model = AutoModelForPreTraining.from_pretrained(name)\n"
        "        found = model(torch.stack([pixels] * 2, 1)).representations\n"
        "    elif 'Backbone' in name:\n"
        "        found = hf_vicreg.BigBirdViTBackbone.from_pretrained(name)(pixels).feature_maps[0]\n"
        "    elif 'Classification' in name:\n"
        "        found = AutoModelForImageClassification.from_pretrained(name)(pixels).logits\n"
        "    else:\n"
        "        found = AutoModel.from_pretrained(name)(pixels).last_hidden_state\n"
        "    assert torch.equal(found, expected), name\n"
        "print(len(features))\n"
    )
    finished = ranks(1, program, tmp_path, torch.get_num_threads())
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.split() == ["7"]


def test_encoder_weights_load_into_every_head(tmp_path):
    encoder = BigBirdViTModel(tiny_config())
    encoder.save_pretrained(tmp_path)
    backbone = BigBirdViTBackbone.from_pretrained(tmp_path, out_features=STAGES)
    assert backbone.config.out_features == STAGES
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=7)
    assert classifier.classifier.out_features == 7
    for model in (backbone, classifier.bigbird_vit):
        for name, tensor in encoder.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor)
    classifier.save_pretrained(tmp_path / "classifier")
    again = AutoModel.from_pretrained(tmp_path / "classifier")
    assert torch.equal(again.embeddings.cls_token, encoder.embeddings.cls_token)


def test_auto_classes_know_the_family():
    config = tiny_config()
    assert type(AutoModel.from_config(config)) is BigBirdViTModel
    assert type(AutoBackbone.from_config(config)) is BigBirdViTBackbone
    assert type(AutoModelForImageClassification.from_config(config)) is BigBirdViTForImageClassification
    assert type(AutoModelForPreTraining.from_config(VicRegConfig(encoder=config))) is VicRegForPreTraining
