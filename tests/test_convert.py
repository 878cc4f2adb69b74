"""`hf-vicreg convert`: equal when dense, a report of what sparse attention changes, and one line for bad input."""

import json

import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_vicreg import BigBirdViTConfig, BigBirdViTForImageClassification, BigBirdViTImageProcessor, BigBirdViTModel
from hf_vicreg.cli import main
from hf_vicreg.convert import convert, feature_drift
from hf_vicreg.training.errors import InputError

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Dense models in folders, made from configs."""
    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    settings = SHAPE | {"initializer_range": 0.2}
    registers = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=3, **settings))
    registers.save_pretrained(folder / "registers")
    processor = BitImageProcessor(
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6]
    )
    processor.save_pretrained(folder / "registers")
    Dinov2Model(Dinov2Config(**settings)).save_pretrained(folder / "dinov2")
    for name, fields in {
        "dinov3": {"num_register_tokens": 4},
        "dinov3-gated": {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
        "dinov3-no-registers": {},
    }.items():
        DINOv3ViTModel(DINOv3ViTConfig(intermediate_size=48, **settings, **fields)).save_pretrained(folder / name)
    labels = {0: "cat", 1: "dog", 2: "eel"}
    config = ViTConfig(intermediate_size=48, id2label=labels, label2id={v: k for k, v in labels.items()}, **settings)
    ViTForImageClassification(config).save_pretrained(folder / "classifier")
    ViTModel(ViTConfig(intermediate_size=48, **settings | {"image_size": (32, 48)})).save_pretrained(folder / "wide")
    half = ViTModel(ViTConfig(intermediate_size=48, **settings)).bfloat16()
    half.save_pretrained(folder / "half")
    ViTModel(ViTConfig(intermediate_size=48, **settings | {"patch_size": (8, 4)})).save_pretrained(folder / "slim")
    Dinov2Model(Dinov2Config(**settings | {"image_size": (32, 48)})).save_pretrained(folder / "impossible")
    Dinov2Model(Dinov2Config(**settings)).save_pretrained(folder / "processor")
    (folder / "processor" / "preprocessor_config.json").write_text("{")
    (folder / "file").write_text("")
    SwinModel(SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[2, 2])).save_pretrained(folder / "swin")
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize(
    "name", ["registers", "dinov2", "classifier", "dinov3", "dinov3-gated", "dinov3-no-registers"]
)
def test_converted_folder_equals_the_source(name, sources, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(sources / name), str(out), "--tile_size", "1", "--image_sizes", "32", "40", "64"]) == 0
    printed = capsys.readouterr().out
    auto_class = AutoModelForImageClassification if name == "classifier" else AutoModel
    source, model = auto_class.from_pretrained(sources / name), auto_class.from_pretrained(out)
    assert type(model) is (BigBirdViTForImageClassification if name == "classifier" else BigBirdViTModel)
    assert model.config.id2label == source.config.id2label
    flags = {"interpolate_pos_encoding": True} if name == "classifier" else {}
    for side in (32, 40, 64):
        pixel_values = torch.randn(2, 3, side, side)
        torch.testing.assert_close(model(pixel_values)[0], source(pixel_values, **flags)[0], atol=1e-5, rtol=1e-5)
    record = json.loads((out / "conversion.json").read_text())
    assert record["difference"] < 1e-5
    assert [one["height"] for one in record["drift"]] == [32, 40, 64]
    for one in record["drift"]:
        assert len(one["cosine"]) == len(one["relative_norm"]) == 4  # three layers and the output
        assert 0 < one["density"] < 1
        assert all(0 < value < 1 for value in one["cosine"])
        assert f"{one['cosine'][1]:.4f}" in printed
    assert record["drift"][2]["density"] < record["drift"][0]["density"]
    assert record["drift"][2]["relative_norm"][-1] > record["drift"][0]["relative_norm"][-1]


def test_drift_is_what_it_says(sources):
    model = BigBirdViTModel.from_dense(sources / "registers", tile_size=1, num_random_blocks=1)
    pixel_values = torch.randn(2, 3, 40, 72)
    found = feature_drift(model, pixel_values)
    assert model.config.attention_type == "original_full"
    sparse = BigBirdViTModel.from_dense(
        sources / "registers", tile_size=1, num_random_blocks=1, attention_type="block_sparse"
    )
    one, other = (of(pixel_values, output_hidden_states=True) for of in (model, sparse))
    for layer, (dense, changed) in enumerate(
        zip(
            [*one.hidden_states[1:], one.last_hidden_state],
            [*other.hidden_states[1:], other.last_hidden_state],
            strict=True,
        )
    ):
        dense, changed = dense[:, 4:], changed[:, 4:]
        cosine = (dense * changed).sum(-1) / dense.norm(dim=-1) / changed.norm(dim=-1)
        assert found.cosine[layer] == pytest.approx(cosine.mean().item(), abs=1e-5)
        assert found.relative_norm[layer] == pytest.approx(
            ((dense - changed).norm() / dense.norm()).item(), rel=1e-4, abs=1e-6
        )
    densities = [pattern.density for pattern in sparse.attention_patterns(40, 72)]
    assert found.density == pytest.approx(sum(densities) / 3)


def test_processor_comes_along(sources, tmp_path):
    assert main(["convert", str(sources / "registers"), str(tmp_path / "out")]) == 0
    ours, theirs = (AutoImageProcessor.from_pretrained(one) for one in (tmp_path / "out", sources / "registers"))
    assert type(ours) is BigBirdViTImageProcessor
    image = Image.effect_noise((70, 50), 100).convert("RGB")
    found, expected = (one(image, return_tensors="pt").pixel_values for one in (ours, theirs))
    assert torch.equal(found, expected)


def test_images_and_attention_type_are_the_users(sources, tmp_path, image_folder, capsys):
    folder = image_folder(count=3)
    out = tmp_path / "out"
    flags = ["--images", str(folder), "--attention_type", "block_sparse", "--attention_layout", "raster"]
    assert main(["convert", str(sources / "registers"), str(out), *flags, "--block_size", "4"]) == 0
    config = BigBirdViTConfig.from_pretrained(out)
    assert (config.attention_type, config.attention_layout, config.block_size) == ("block_sparse", "raster", 4)
    printed = capsys.readouterr().out
    assert "on 3 images" in printed
    assert "blocks of 4 patches" in printed
    assert "32x32, 48x48, 64x64 pixels" in printed
    other = tmp_path / "noise"
    assert main(["convert", str(sources / "registers"), str(other), *flags[2:], "--block_size", "4"]) == 0
    assert "no image processor" not in capsys.readouterr().out
    drifts = [json.loads((one / "conversion.json").read_text())["drift"] for one in (out, other)]
    assert drifts[0][2]["density"] == drifts[1][2]["density"]
    assert drifts[0][2]["cosine"] != drifts[1][2]["cosine"]


def test_source_that_is_not_square_is_compared_at_its_own_size(sources, tmp_path, capsys):
    # transformers cannot resample its positions; ours can
    assert main(["convert", str(sources / "wide"), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "equal the source's at 32x48 pixels" in printed
    assert "choose smaller tiles or larger images" in printed
    assert "the source has no image processor" in printed
    model = AutoModel.from_pretrained(tmp_path / "out")
    assert model(torch.randn(1, 3, 40, 40)).pooler_output.shape == (1, 32)
    assert main(["convert", str(sources / "slim"), str(tmp_path / "slim")]) == 0
    assert "equal the source's at 32x32 pixels" in capsys.readouterr().out


def test_half_precision_is_compared_in_float_and_kept(sources, tmp_path):
    # a ViT resamples its positions in its own type: it would differ from ours by rounding in bf16
    assert main(["convert", str(sources / "half"), str(tmp_path / "out")]) == 0
    source, model = AutoModel.from_pretrained(sources / "half"), AutoModel.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.embeddings.cls_token, source.embeddings.cls_token)


def test_empty_folder_is_filled(sources, tmp_path):
    (tmp_path / "empty").mkdir()
    assert main(["convert", str(sources / "dinov2"), str(tmp_path / "empty")]) == 0
    assert (tmp_path / "empty" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at all", "out"], "`SOURCE`: expected the folder or Hub id of a vision model"),
        (["swin", "out"], "expected a model of type vit, dinov2, dinov2_with_registers, dinov3_vit; got 'swin'"),
        (["dinov2", "swin"], "`OUT`: expected a new or empty folder, got 'swin'"),
        (["dinov2", "out", "--tile_size", "0"], "`tile_size`: expected a positive int or (height, width), got 0"),
        (
            ["dinov2", "out", "--image_sizes", "32", "4"],
            "expected at least one patch (8, 8) and at most 4096 pixels, got 4",
        ),
        (["dinov2", "file/out"], "`OUT`: expected a folder in a folder, got 'file/out'"),
        (["dinov2", "out", "--image_sizes", "1000000"], "at most 4096 pixels, got 1000000"),
        (["dinov2", "out", "--images", "empty"], "`images`: expected a folder with images, got none in 'empty'"),
        (["impossible", "out"], "`SOURCE`: expected it to take images of 32x48 pixels, got: "),
        (["wide", "out", "--image_sizes", "40"], "`SOURCE`: expected it to take images of 40x40 pixels, got: "),
        (["processor", "out"], "preprocessor_config.json"),
    ],
    ids=[
        "missing",
        "other-type",
        "not-empty",
        "tile",
        "size",
        "in-a-file",
        "huge",
        "no-images",
        "impossible",
        "not-square",
        "processor",
    ],
)
def test_bad_input_gets_one_line(sources, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(sources)
    assert main(["convert", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (sources / "out").exists()


def test_sparse_attention_is_tuned_to_the_dense_features(tmp_path, capsys):
    torch.manual_seed(0)
    source = Dinov2Model(Dinov2Config(**SHAPE | {"patch_size": 4, "initializer_range": 0.2}))
    with torch.no_grad():
        for name, tensor in source.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                tensor.mul_(2)  # attention that is not spread over all
    source.save_pretrained(tmp_path / "source")
    out = tmp_path / "out"
    flags = ["--tile_size", "1", "--num_random_blocks", "0", "--image_sizes", "32"]
    flags += ["--adapt", "digits", "--max_steps", "16"]
    assert main(["convert", str(tmp_path / "source"), str(out), *flags]) == 0
    printed = capsys.readouterr().out
    found = json.loads((out / "conversion.json").read_text())
    done = found["adaptation"]
    assert [(one["height"], one["width"]) for one in done["after"]] == [(32, 32)]
    assert (done["steps"], done["num_held_out"]) == (16, 143)
    for before, after in zip(done["before"], done["after"], strict=True):
        assert after["cosine"] > before["cosine"]
        assert f"{before['cosine']:.4f} -> {after['cosine']:.4f}" in printed
    for before, after in zip(found["drift"], found["adapted_drift"], strict=True):
        assert after["relative_norm"][-1] < before["relative_norm"][-1]
    model = AutoModel.from_pretrained(out).eval()
    assert model.config.attention_type == "block_sparse"
    plain = BigBirdViTModel.from_dense(tmp_path / "source", tile_size=1, num_random_blocks=0).eval()
    plain.config.attention_type = "block_sparse"
    pixel_values = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        tuned, before = (one(pixel_values).pooler_output for one in (model, plain))
    assert not torch.allclose(tuned, before, atol=1e-3)  # what was written is what was tuned


def test_relative_errors_and_neighbours_are_their_definitions():
    from hf_vicreg.training.prepare.adapt import relative_error
    from hf_vicreg.training.prepare.agreement import _nearest_others

    found, wanted = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64)
    mean = wanted.reshape(15, 4).mean(0)
    expected = sum((found[i, j] - wanted[i, j]).pow(2).sum() for i in range(3) for j in range(5))
    expected = expected / sum((wanted[i, j] - mean).pow(2).sum() for i in range(3) for j in range(5))
    torch.testing.assert_close(relative_error(found, wanted), expected)
    assert relative_error(wanted, wanted) == 0
    features = torch.randn(9, 6)
    features[4] = features[2]  # a copy may be listed in place of an image itself
    nearest = _nearest_others(features, 3)
    centred = features - features.mean(0)
    cosines = torch.nn.functional.cosine_similarity(centred[:, None], centred[None], dim=-1)
    cosines.fill_diagonal_(-2)
    for index in set(range(9)) - {2, 4}:  # of equals, either one
        torch.testing.assert_close(cosines[index, nearest[index]].sort().values, cosines[index].topk(3).values.flip(0))
    assert nearest.shape == (9, 3)


def test_steps_without_images_to_tune_on_are_refused(sources, tmp_path, capsys):
    assert main(["convert", str(sources / "dinov2"), str(tmp_path / "out"), "--max_steps", "3"]) == 2
    assert "`max_steps`: expected images to tune on beside it, got none; add --adapt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--adapt": "few"}, "`adapt`: expected at least 16 images, found 5; give more"),
        ({"--adapt": "nowhere"}, "'nowhere', which does not exist"),
        ({"--max_steps": "0"}, "`max_steps`: expected at least 1, got 0"),
        ({"--time_budget": "soon"}, "`time_budget`: expected a time like 90s, 15m, 2h, 1d or 1h30m, got 'soon'"),
    ],
    ids=["few", "nowhere", "no-step", "no-number"],
)
def test_what_cannot_be_tuned_on_is_one_line(changes, message, sources, tmp_path, image_folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image_folder(5, name="few")
    flags = {"--adapt": str(image_folder(40)), "--image_sizes": "32", "--time_budget": "8s"} | changes
    arguments = [part for pair in flags.items() for part in pair]
    assert main(["convert", str(sources / "dinov2"), "out", *arguments]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error
    assert not (tmp_path / "out").exists()


def test_models_of_other_channels_are_tuned_on_no_colours(tmp_path):
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, num_channels=4)
    ViTModel(config).save_pretrained(tmp_path / "source")
    with pytest.raises(InputError, match=r"`adapt`: expected a model of RGB images, .* takes 4 channels"):
        convert(tmp_path / "source", tmp_path / "out", adapt="digits", max_steps=1)
    assert not (tmp_path / "out").exists()


def test_no_time_for_a_step_is_one_line(image_folder):
    from hf_vicreg.training.errors import InputError
    from hf_vicreg.training.images.sources import load_sources
    from hf_vicreg.training.prepare.adapt import adapt

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    model = BigBirdViTModel(BigBirdViTConfig(intermediate_size=24, tile_size=1, **shape))
    source, _ = load_sources(train_dir=str(image_folder(40)))
    with pytest.raises(InputError, match="`time_budget`: expected time for a step at each of 1 image sizes, a step"):
        adapt(model, model, source, BigBirdViTImageProcessor(), [(32, 32)], 0.0)
