"""What users of transformers take for granted: defaults, old folders, probabilities on request, quiet loading."""

import inspect
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    DetrConfig,
    DetrForObjectDetection,
    GPT2Config,
    GPT2LMHeadModel,
    VisionEncoderDecoderModel,
)

from hf_vicreg import (
    BigBirdViTBackbone,
    BigBirdViTConfig,
    BigBirdViTForImageClassification,
    BigBirdViTModel,
    VicRegConfig,
    VicRegForPreTraining,
)
from hf_vicreg.modeling import call_checks

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "tile_size": 1,
    "num_random_blocks": 1,
}
# `config.json` as it was stored while the defaults were tiles of 8x8 patches and 3 random ones
STORED_BEFORE = {
    "architectures": ["BigBirdViTModel"],
    "attention_layout": "tiles",
    "attention_seed": 0,
    "attention_type": "block_sparse",
    "block_size": 64,
    "dtype": "float32",
    "hidden_size": 32,
    "image_size": 224,
    "intermediate_size": 48,
    "model_type": "bigbird_vit",
    "num_attention_heads": 2,
    "num_global_tiles": 0,
    "num_hidden_layers": 2,
    "num_random_blocks": 3,
    "num_register_tokens": 0,
    "out_features": ["stage2"],
    "out_indices": [2],
    "patch_size": 4,
    "pooling": "mean",
    "position_embedding_type": "rope",
    "tile_size": 8,
    "transformers_version": "5.24.0",
    "window_size": 3,
}
FIELDS = ("tile_size", "num_random_blocks", "window_size", "num_global_tiles", "attention_seed", "attention_layout")


def test_the_default_is_sparse_on_its_own_grid():
    model = BigBirdViTModel(BigBirdViTConfig())
    patterns = model.attention_patterns(224, 224)
    assert patterns[0].grid == (14, 14)
    assert max(pattern.density for pattern in patterns) <= 0.6


def test_the_pattern_is_stored_even_where_it_is_the_default(tmp_path):
    # a change of the defaults must not change what a folder computes
    encoder = BigBirdViTConfig()
    for config, part in (
        (encoder, None),
        (VicRegConfig(encoder=encoder, second_encoder=encoder), "encoder"),
        (VicRegConfig(encoder=encoder, second_encoder=encoder), "second_encoder"),
        (DetrConfig(backbone_config=encoder), "backbone_config"),
    ):
        config.save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "config.json").read_text())
        stored = stored if part is None else stored[part]
        assert {name: stored.get(name) for name in FIELDS} == {name: getattr(encoder, name) for name in FIELDS}


@pytest.fixture
def folder_of_before(tmp_path):
    """A folder of an earlier release: the old pattern, and an empty tensor where there are no registers."""
    model = BigBirdViTModel(BigBirdViTConfig(**STORED_BEFORE))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors") | {"embeddings.register_tokens": torch.empty(1, 0, 32)}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(STORED_BEFORE))
    return tmp_path


@pytest.mark.parametrize("load", [AutoModel, BigBirdViTModel, BigBirdViTBackbone, BigBirdViTForImageClassification])
def test_folders_of_before_load_quietly_and_keep_their_pattern(load, folder_of_before, caplog, quiet_logs):
    model, info = load.from_pretrained(folder_of_before, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert {name.split(".")[0] for name in info["missing_keys"]} <= {"classifier"}
    if not info["missing_keys"]:
        assert not caplog.records
    encoder = getattr(model, "bigbird_vit", model)
    pattern = encoder.attention_pattern(224, 224, layer=1)
    assert pattern.tile_grid == (7, 7)
    assert (pattern.neighbours[0] >= 0).sum(1).tolist()[24] == 9 + 3


def test_parts_of_before_load_into_larger_models(folder_of_before):
    weights = load_file(folder_of_before / "model.safetensors")
    wrapper = VicRegForPreTraining.from_encoder_pretrained(folder_of_before, expander_sizes=[8, 8])
    assert torch.equal(wrapper.encoder.embeddings.cls_token, weights["embeddings.cls_token"])
    wrapper.encoder.load_state_dict(weights, strict=True)
    assert "embeddings.register_tokens" in weights  # the caller's own


@pytest.mark.parametrize("outer", ["wrapper", "detector"])
def test_larger_models_of_before_load(outer, tmp_path, caplog, quiet_logs):
    if outer == "wrapper":
        model = VicRegForPreTraining(VicRegConfig(encoder=BigBirdViTConfig(**SMALL), expander_sizes=[8, 8]))
        prefix = "encoder."
    else:
        model, prefix = detector(), "model.backbone.model."
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path) | {f"{prefix}embeddings.register_tokens": torch.empty(1, 0, 32)}
    save_file(weights, path, {"format": "pt"})
    _, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    if outer == "wrapper":
        assert not info["unexpected_keys"]
        assert not caplog.records
    else:  # DETR holds its backbone in a module that tells transformers nothing of its parts: a report, no error
        assert info["unexpected_keys"] == {f"{prefix}embeddings.register_tokens"}


@pytest.mark.parametrize("model_class", [BigBirdViTModel, BigBirdViTForImageClassification, BigBirdViTBackbone])
@pytest.mark.parametrize("registers", [0, 2])
def test_no_parameter_is_empty(model_class, registers):
    model = model_class(BigBirdViTConfig(**SMALL, num_register_tokens=registers))
    assert all(one.numel() for one in model.state_dict().values())
    assert any("register_tokens" in name for name, _ in model.named_parameters()) == bool(registers)
    model(torch.zeros(1, 3, 32, 32))


def detector(**fields):
    config = DetrConfig(
        backbone_config=BigBirdViTConfig(**SMALL),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=3,
        **fields,
    )
    return DetrForObjectDetection(config)


@pytest.fixture
def quiet_logs(caplog):
    """The library's logger reaches `caplog`, and what is said once may be said once more."""
    from transformers.utils import logging

    logging.enable_propagation()
    call_checks.logger.warning_once.cache_clear()
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    logging.disable_propagation()


def said(caplog):
    return [record.getMessage() for record in caplog.records if "output_attentions" in record.getMessage()]


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("by", ["keyword", "configuration"])
def test_probabilities_come_whatever_the_implementation(implementation, by, caplog, quiet_logs):
    model = BigBirdViTModel(BigBirdViTConfig(**SMALL)).eval()
    model.set_attn_implementation("eager")
    pixel_values = torch.randn(2, 3, 40, 56)
    expected = model(pixel_values, output_attentions=True)
    assert not said(caplog)
    model.set_attn_implementation(implementation)
    keywords = {"output_attentions": True}
    if by == "configuration":
        model.config.output_attentions, keywords = True, {}
    for _ in range(2):
        found = model(pixel_values, **keywords)
    assert len(found.attentions) == 2
    for one, other in zip([*found.attentions, found[0]], [*expected.attentions, expected[0]], strict=True):
        torch.testing.assert_close(one, other)
    assert len(said(caplog)) == 1
    assert f"'{implementation}' has no probabilities" in said(caplog)[0]
    assert model.config._attn_implementation == implementation  # for that call alone
    model.config.output_attentions = False
    if implementation == "sdpa":
        assert model(pixel_values).attentions is None


def test_configurations_may_ask_for_probabilities_with_any_implementation(tmp_path):
    config = BigBirdViTConfig(**SMALL, output_attentions=True, attn_implementation="sdpa")
    BigBirdViTModel(config).save_pretrained(tmp_path)
    model = BigBirdViTModel.from_pretrained(tmp_path, attn_implementation="sdpa", output_attentions=True)
    assert len(model(torch.zeros(1, 3, 32, 32)).attentions) == 2
    assert model(torch.zeros(1, 3, 32, 32), output_attentions=False).attentions is None


def test_models_around_it_may_ask_for_probabilities(caplog, quiet_logs):
    pixel_values = torch.randn(2, 3, 32, 32)
    # DETR asks its own layers alone, which have probabilities in `eager` only
    found = detector()
    found.model.encoder.set_attn_implementation("eager")
    outputs = found(pixel_values, output_attentions=True, output_hidden_states=True)
    assert outputs.encoder_attentions[0].shape == (2, 2, 16, 16)
    assert not said(caplog)

    decoder = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=20, n_embd=32, n_layer=1, n_head=2, add_cross_attention=True, bos_token_id=1, eos_token_id=2
        )
    )
    captioner = VisionEncoderDecoderModel(encoder=BigBirdViTModel(BigBirdViTConfig(**SMALL)), decoder=decoder)
    captioner.config.decoder_start_token_id = captioner.config.pad_token_id = 0
    outputs = captioner(pixel_values, labels=torch.ones(2, 4, dtype=torch.int64), output_attentions=True)
    assert [one.shape for one in outputs.encoder_attentions] == [(2, 2, 17, 17)] * 2
    assert len(said(caplog)) == 1
    generated = captioner.generate(
        pixel_values, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True, do_sample=False
    )
    assert len(generated.encoder_attentions) == 2


@pytest.mark.parametrize("form", ["one", "local", "two"])
def test_the_wrapper_returns_the_encoders_states_view_by_view(form):
    small = BigBirdViTConfig(**SMALL)
    second = BigBirdViTConfig(**SMALL | {"num_hidden_layers": 1}) if form == "two" else None
    model = VicRegForPreTraining(VicRegConfig(encoder=small, second_encoder=second, expander_sizes=[8, 8])).eval()
    views, crops = torch.randn(3, 2, 3, 32, 32), torch.randn(3, 1, 3, 16, 16)
    inputs = {"local_pixel_values": crops} if form == "local" else {}
    outputs = model(views, **inputs, output_attentions=True, output_hidden_states=True)
    images = [*views.unbind(1), *(crops.unbind(1) if inputs else ())]
    encoders = [model.encoder] * 3 if second is None else model.encoders
    assert len(outputs.attentions) == len(outputs.hidden_states) == len(images)
    for index, image in enumerate(images):
        alone = encoders[index](image, output_attentions=True, output_hidden_states=True)
        for name in ("attentions", "hidden_states"):
            for one, other in zip(outputs[name][index], alone[name], strict=True):
                torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert model(views).attentions is None


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda: BigBirdViTModel(BigBirdViTConfig(**SMALL))(torch.zeros(1, 3, 32, 32), pixel_maks=1), "pixel_mask"),
        (
            lambda: BigBirdViTForImageClassification(BigBirdViTConfig(**SMALL))(torch.zeros(1, 3, 32, 32), lables=1),
            "labels",
        ),
        (
            lambda: BigBirdViTBackbone(BigBirdViTConfig(**SMALL))(torch.zeros(1, 3, 32, 32), output_hiden_states=1),
            "output_hidden_states",
        ),
        (
            lambda: VicRegForPreTraining(VicRegConfig(encoder=BigBirdViTConfig(**SMALL), expander_sizes=[8]))(
                torch.zeros(2, 2, 3, 32, 32), local_pixel_value=1
            ),
            "local_pixel_values",
        ),
    ],
    ids=["encoder", "classifier", "backbone", "wrapper"],
)
def test_misspelt_keywords_are_named(call, hint):
    with pytest.raises(TypeError, match=f"expected one of .*; did you mean `{hint}`"):
        call()


def test_keywords_that_transformers_hands_to_any_model_are_taken():
    model = BigBirdViTModel(BigBirdViTConfig(**SMALL)).eval()
    pixel_values = torch.randn(1, 3, 32, 32)
    found = model(pixel_values, num_items_in_batch=4, interpolate_pos_encoding=True, use_cache=False)
    assert torch.equal(found[0], model(pixel_values)[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: BigBirdViTModel(BigBirdViTConfig(**SMALL)),
        lambda: BigBirdViTBackbone(BigBirdViTConfig(**SMALL)),
        lambda: VicRegForPreTraining(VicRegConfig(encoder=BigBirdViTConfig(**SMALL), expander_sizes=[8])),
    ],
    ids=["encoder", "backbone", "wrapper"],
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_nothing_takes_these_models_for_language_models(make, caplog, quiet_logs):
    # whoever walks over a model's attributes reads its loss
    for module in make().modules():
        inspect.getmembers(module)
    assert not [record for record in caplog.records if "ForCausalLM" in record.getMessage()]
