"""Warm start: transformers' ViT, DINOv2 and DINOv3, made from configs, give under our names what they give."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Dinov2Backbone,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTBackbone,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_vicreg import BigBirdViTBackbone, BigBirdViTForImageClassification, BigBirdViTModel

SIZES = [(32, 32), (40, 72), (24, 16)]  # the native one, a larger one and a smaller one
SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
# names of transformers before 5.20
OLD_NAMES = (
    r"attention\.(?:attention|output)\.(\w)\w+\.",
    lambda found: f"attention.{found[1].replace('d', 'o')}_proj.",
)
SOURCES = {
    "vit": lambda: ViTModel(ViTConfig(intermediate_size=48, **SHAPE)),
    "vit-no-pooler-no-bias": lambda: ViTModel(
        ViTConfig(intermediate_size=48, qkv_bias=False, **SHAPE), add_pooling_layer=False
    ),
    "vit-classifier": lambda: ViTForImageClassification(
        ViTConfig(intermediate_size=48, hidden_act="gelu_new", num_labels=7, **SHAPE)
    ),
    "dinov2": lambda: Dinov2Model(Dinov2Config(layerscale_value=0.5, **SHAPE)),
    "dinov2-swiglu": lambda: Dinov2Model(Dinov2Config(use_swiglu_ffn=True, use_mask_token=True, **SHAPE)),
    "registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=3, **SHAPE)),
    "dinov3": lambda: make_dinov3(num_register_tokens=4, layerscale_value=0.7),
    "dinov3-gated": lambda: make_dinov3(num_register_tokens=4, use_gated_mlp=True, hidden_act="silu"),
    "dinov3-gated-by-gelu": lambda: make_dinov3(num_register_tokens=1, use_gated_mlp=True),
    "dinov3-no-registers": lambda: make_dinov3(num_register_tokens=0, rope_theta=50.0),
    "dinov3-no-biases": lambda: make_dinov3(query_bias=False, value_bias=False, layer_norm_eps=1e-3),
    "dinov3-key-bias": lambda: make_dinov3(key_bias=True, num_register_tokens=2),
}


def make_dinov3(**fields):
    return DINOv3ViTModel(DINOv3ViTConfig(intermediate_size=48, **SHAPE | fields))


def make_source(name):
    """A source whose every tensor counts: biases, norms and scales are not what they are initialised to."""
    source = SOURCES[name]().eval()
    with torch.no_grad():
        for tensor in source.parameters():
            tensor.add_(torch.randn_like(tensor), alpha=0.2)
    return source


def source_outputs(source, pixel_values):
    is_dinov3 = source.config.model_type == "dinov3_vit"  # whose prefix names its layers
    encoder = source if is_dinov3 else getattr(source, source.base_model_prefix, source)
    flags = {"interpolate_pos_encoding": True} if encoder.config.model_type == "vit" else {}
    return encoder(pixel_values, output_hidden_states=True, **flags)


@pytest.mark.parametrize("from_folder", [False, True], ids=["model", "folder"])
@pytest.mark.parametrize("name", SOURCES)
def test_outputs_equal_the_sources(name, from_folder, tmp_path):
    source = make_source(name)
    source.save_pretrained(tmp_path)
    model = BigBirdViTModel.from_dense(tmp_path if from_folder else source)
    assert not model.training
    for size in SIZES:
        pixel_values = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = source_outputs(source, pixel_values)
            for implementation in ("sdpa", "eager"):
                model.set_attn_implementation(implementation)
                found = model(pixel_values, output_hidden_states=True)
                pairs = [(found.last_hidden_state, expected.last_hidden_state)]
                pairs += zip(found.hidden_states, expected.hidden_states, strict=True)
                if expected.pooler_output is not None:
                    pairs.append((found.pooler_output, expected.pooler_output))
                for one, other in pairs:
                    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def our_name(name):
    """A source's name of a parameter as ours."""
    for theirs, ours in {
        "patch_embeddings.": "projection.",
        "projection.projection.": "projection.",
        "model.layer.": "encoder.layer.",
    }.items():
        name = name.replace(theirs, ours)
    return re.sub(r"^norm\.", "layernorm.", re.sub(*OLD_NAMES, name))


@pytest.mark.parametrize("name", ["registers", *(one for one in SOURCES if one.startswith("dinov3"))])
def test_gradients_equal_the_sources(name):
    source = make_source(name)
    model, pixel_values = BigBirdViTModel.from_dense(source), torch.randn(2, 3, 40, 72)
    weight = torch.randn(2, 46 + getattr(source.config, "num_register_tokens", 0), 32)
    for one in (source, model):
        (one(pixel_values).last_hidden_state * weight).sum().backward()
    gated = getattr(model.config, "use_swiglu_ffn", False)
    compared = 0
    for theirs, parameter in source.named_parameters():
        if parameter.grad is not None and parameter.numel():
            ours = our_name(theirs)
            if not gated:
                ours = ours.replace("mlp.up_proj", "mlp.fc1").replace("mlp.down_proj", "mlp.fc2")
            wanted = parameter.grad
            found = model.get_parameter(ours).grad
            assert (found - wanted).norm() <= 1e-4 * (1 + wanted.norm()), theirs
            compared += 1
    assert compared == len(list(model.parameters())) > 40


def test_converted_models_are_saved_and_loaded_bitwise(tmp_path):
    model = BigBirdViTModel.from_dense(make_source("registers"))
    model.save_pretrained(tmp_path)
    pixel_values = torch.randn(2, 3, 40, 72)
    again = BigBirdViTModel.from_pretrained(tmp_path)
    assert torch.equal(again(pixel_values).last_hidden_state, model(pixel_values).last_hidden_state)
    sparse = BigBirdViTModel.from_pretrained(tmp_path, attention_type="block_sparse", tile_size=1)
    assert not sparse.attention_pattern(40, 72).is_full
    assert not torch.allclose(sparse(pixel_values).last_hidden_state, model(pixel_values).last_hidden_state)


def test_a_classifier_takes_its_head_along(tmp_path):
    source = make_source("vit-classifier")
    source.config.id2label = {index: f"kind {index}" for index in range(7)}
    source.config.problem_type = "multi_label_classification"  # a pipeline reads it
    source.save_pretrained(tmp_path)
    pixel_values = torch.randn(2, 3, 40, 72)
    for given in (source, tmp_path):
        model = BigBirdViTForImageClassification.from_dense(given)
        assert model.config.id2label[3] == "kind 3"
        assert model.config.problem_type == "multi_label_classification"
        torch.testing.assert_close(
            model(pixel_values).logits,
            source(pixel_values, interpolate_pos_encoding=True).logits,
            atol=1e-5,
            rtol=1e-5,
        )


def test_a_backbone_gives_the_sources_maps():
    settings = {"out_features": ["stage1", "stage3"], "apply_layernorm": False}
    source = Dinov2Backbone(Dinov2Config(**settings, **SHAPE)).eval()
    model = BigBirdViTBackbone.from_dense(source)
    assert BigBirdViTBackbone.from_dense(source, out_indices=[2]).config.out_features == ["stage2"]
    pixel_values = torch.randn(2, 3, 40, 72)
    for one, other in zip(model(pixel_values).feature_maps, source(pixel_values).feature_maps, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    backbone = BigBirdViTBackbone.from_dense(make_source("vit"))  # which has a pooler
    assert backbone.config.pooler_act is None


def test_a_backbone_of_dinov3_gives_its_maps():
    config = DINOv3ViTConfig(num_register_tokens=2, out_features=["stage1", "stage3"], **SHAPE)
    source = DINOv3ViTBackbone(config).eval()
    model, pixel_values = BigBirdViTBackbone.from_dense(source), torch.randn(2, 3, 40, 72)
    for one, other in zip(model(pixel_values).feature_maps, source(pixel_values).feature_maps, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    source.config.apply_layernorm = False  # it normalises the last map all the same
    with pytest.raises(ValueError, match="`apply_layernorm`: expected True of a DINOv3 backbone, got False"):
        BigBirdViTBackbone.from_dense(source)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"proj_bias": False}, "`proj_bias`: expected True, as this model has it, got False"),
        ({"mlp_bias": False}, "`mlp_bias`: expected True, as this model has it, got False"),
        ({"query_bias": False}, "`query_bias`, `key_bias`, `value_bias`: expected .* got False, False, True"),
        ({"query_bias": False, "value_bias": False, "key_bias": True}, "got False, True, False"),
    ],
    ids=["proj", "mlp", "query", "key-alone"],
)
def test_a_dinov3_that_does_not_fit_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        BigBirdViTModel.from_dense(make_dinov3(**fields))


def test_changes_that_leave_the_weights_are_taken():
    model = BigBirdViTModel.from_dense(
        make_source("dinov2"), attention_type="block_sparse", tile_size=2, pooling="mean", drop_path_rate=0.1
    )
    assert model.config.tile_size == 2
    assert model.config.pooling == "mean"
    assert model.encoder.layer[2].drop_path.rate == pytest.approx(0.1)
    half = BigBirdViTModel.from_dense(make_source("dinov2").half())
    assert half.dtype == torch.float16


def test_what_does_not_fit_is_named(tmp_path):
    swin = SwinModel(SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[2, 2]))
    swin.save_pretrained(tmp_path / "swin")
    for source in (swin, tmp_path / "swin"):
        with pytest.raises(ValueError, match=r"`source`: expected a model of type vit, dinov2, .*; got 'swin'"):
            BigBirdViTModel.from_dense(source)
    for name, value in {"patch_size": 4, "num_register_tokens": 2, "patch_stride": 4}.items():
        with pytest.raises(ValueError, match=f"`{name}`: expected .* as in the source, got {value}"):
            BigBirdViTModel.from_dense(make_source("vit"), **{name: value})
    with pytest.raises(ValueError, match="`tile_sise`: expected a field of BigBirdViTConfig"):
        BigBirdViTModel.from_dense(make_source("vit"), tile_sise=4)
    BigBirdViTModel.from_dense(make_source("vit"), patch_size=[8, 8])  # which is the same
    with pytest.raises(ValueError, match=r"expected tensor 'classifier.weight' \(2, 32\).*, got \(2, 64\)"):
        BigBirdViTForImageClassification.from_dense(Dinov2ForImageClassification(Dinov2Config(**SHAPE)))
    with pytest.raises(ValueError, match=r"expected tensor 'classifier.bias' \(2,\).*, got none"):
        BigBirdViTForImageClassification.from_dense(make_source("vit"))
    with pytest.raises(OSError, match="nowhere"):
        BigBirdViTModel.from_dense(tmp_path / "nowhere")
    source = ViTModel(ViTConfig(pooler_output_size=16, **SHAPE))
    with pytest.raises(ValueError, match=r"expected tensor 'pooler.dense.bias' \(32,\).*, got \(16,\)"):
        BigBirdViTModel.from_dense(source)


@pytest.mark.parametrize("missing", ["layernorm.weight", "(key|k_proj).weight", "position_embeddings"])
def test_missing_tensors_are_named(missing, tmp_path):
    # transformers itself would warn and go on with random numbers
    make_source("vit").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    dropped = [name for name in weights if re.search(missing, name)]  # files keep older names for some
    assert dropped
    save_file(
        {name: weights[name] for name in weights.keys() - dropped}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    message = rf"`source`: expected tensor '\S*{missing}\S*' \(.*\) by its configuration, got none"
    with pytest.raises(ValueError, match=message):
        BigBirdViTModel.from_dense(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "other-shape", "more-layers"])
def test_damaged_files_are_named(damage, tmp_path):
    make_source("vit").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "more-layers":
        ViTConfig(intermediate_size=48, **SHAPE | {"num_hidden_layers": 1}).save_pretrained(tmp_path)
    else:
        weights = load_file(file)
        weights["layernorm.weight"] = torch.ones(5)
        save_file(weights, file, {"format": "pt"})
    message = {
        "truncated": "`source`: expected weights and a configuration that load, got SafetensorError",
        "other-shape": r"`source`: expected tensor '\S*layernorm.weight' \(32,\) by its configuration, got \(5,\)",
        "more-layers": r"`source`: expected no tensor '\S+' by its configuration, got one",
    }
    with pytest.raises(ValueError, match=message[damage]):
        BigBirdViTModel.from_dense(tmp_path)


def test_weights_of_other_forms_are_refused(tmp_path):
    source = make_source("vit")
    source.config.save_pretrained(tmp_path)
    torch.save(source.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        BigBirdViTModel.from_dense(tmp_path)
