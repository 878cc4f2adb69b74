"""`hf-vicreg export`: programs that run where the package does not exist, and give what the model gives."""

import numpy as np
import pytest
import torch
from transformers import (
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from hf_vicreg import BigBirdViTConfig, BigBirdViTForImageClassification, BigBirdViTModel
from hf_vicreg.cli import main
from hf_vicreg.export import TOLERANCE, export
from hf_vicreg.modeling.image_processing_bigbird_vit import BigBirdViTImageProcessor
from hf_vicreg.training.tasks.arguments import DetectionArguments
from hf_vicreg.training.tasks.detection.model import build_detector, build_detector_processor

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
MODELS = {
    # 7x5 patches, tiles that do not divide them: a mask over a dense grid
    "masked": {"image_size": (56, 40), "patch_size": 8, "tile_size": 2, "num_register_tokens": 2, "pooling": "mean"},
    "overlapping": {"image_size": 36, "patch_size": 8, "patch_stride": 4, "tile_size": 3, "num_random_blocks": 1},
    "blocks": {"image_size": 160, "patch_size": 4, "tile_size": 8, "num_random_blocks": 1, "num_global_tiles": 1},
    "convolutions": {"image_size": 36, "patch_size": 8, "tile_size": 2, "patch_embedding": "conv"},
    "learned": {
        "image_size": 32,
        "patch_size": 8,
        "position_embedding_type": "absolute",
        "attention_type": "original_full",
    },
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns a function from the name of a model to its folder; the same model is made once."""
    root = tmp_path_factory.mktemp("models")

    def make(name, kind=BigBirdViTModel):
        folder = root / f"{name}_{kind.__name__}"
        if not folder.exists():
            torch.manual_seed(0)
            config = BigBirdViTConfig(**SMALL, **MODELS[name], initializer_range=0.3, num_labels=5)
            kind(config).save_pretrained(folder)
            height, width = config.image_size_hw
            BigBirdViTImageProcessor(size={"height": height, "width": width}).save_pretrained(folder)
        return str(folder)

    return make


@pytest.mark.parametrize("format", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        "blocks",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("masked", "overlapping", "convolutions", "learned")),
    ],
)
def test_a_program_gives_what_the_model_gives(saved, tmp_path, name, format):
    # `export` itself runs the program in a process that cannot import the package, for batches of 1, 2 and 7
    path = tmp_path / f"model{'.onnx' if format == 'onnx' else '.pt2'}"
    done = export(saved(name), path, format=format)
    assert done.difference <= TOLERANCE
    assert done.cosine > 1 - 1e-6
    assert list(tmp_path.iterdir()) == [path]
    if format == "onnx":
        import onnx

        assert {one.domain for one in onnx.load(path).graph.node} <= {"", "pkg.onnxscript.torch_lib"}
    else:
        nodes = {str(node.target) for node in torch.export.load(path).graph.nodes}
        assert not [one for one in nodes if "bigbird" in one]


def test_a_pooler_without_weights_is_left_out(tmp_path):
    """The feature is what every other command takes for it: the first token."""
    config = ViTConfig(**SMALL, image_size=32, patch_size=8)
    torch.manual_seed(0)
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    export(str(tmp_path / "vit"), tmp_path / "vit.pt2", format="torch")
    program = torch.export.load(tmp_path / "vit.pt2").module()
    features, tokens = program(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(features, tokens[:, 0])


@pytest.mark.parametrize("format", [pytest.param("torch", marks=pytest.mark.slow), "onnx"])
def test_a_classifier_at_another_size(saved, tmp_path, format):
    folder = saved("masked", BigBirdViTForImageClassification)
    path = tmp_path / f"classes{'.onnx' if format == 'onnx' else '.pt2'}"
    done = export(folder, path, format=format, task="classification", height=24, width=64)
    assert (done.height, done.width) == (24, 64)
    assert done.difference <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torch", "onnx"])
def test_a_detector(saved, tmp_path, format):
    encoder = saved("masked")
    arguments = DetectionArguments(
        d_model=32, num_queries=5, encoder_layers=1, decoder_layers=2, image_height=56, image_width=40
    )
    detector, folder = build_detector(encoder, ["cell", "platelet"], arguments), tmp_path / "detector"
    detector.save_pretrained(folder)
    build_detector_processor(encoder, detector.config.backbone_config, 56, 40).save_pretrained(folder)
    path = tmp_path / f"boxes{'.onnx' if format == 'onnx' else '.pt2'}"
    done = export(str(folder), path, format=format, task="detection")
    assert (done.height, done.width) == (56, 40)
    assert done.difference <= TOLERANCE


def test_a_detector_that_counts_its_batch_in_python_gets_one_line(tmp_path, capsys):
    """Of transformers', RT-DETR: its configuration names no channels either."""
    torch.manual_seed(0)
    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 32, 64], depths=[1] * 4, layer_type="basic", out_indices=[2, 3, 4]
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[16, 32, 64],
        encoder_hidden_dim=32,
        d_model=32,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        decoder_in_channels=[32] * 3,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=10,
    )
    assert not hasattr(config, "num_channels")
    RTDetrForObjectDetection(config).save_pretrained(tmp_path / "detector")
    RTDetrImageProcessor().save_pretrained(tmp_path / "detector")
    capsys.readouterr()
    command = ["export", str(tmp_path / "detector"), str(tmp_path / "out.pt2"), "--format", "torch"]
    assert main([*command, "--task", "detection", "--height", "64", "--width", "64"]) == 2
    (line,) = (one for one in capsys.readouterr().err.splitlines() if one.startswith("error: "))
    assert "`format`: this model cannot be written as 'torch': Constraints violated (batch)" in line
    assert not (tmp_path / "out.pt2").exists()


def test_an_onnx_program_from_the_command_line_runs_here_as_well(saved, tmp_path, capsys):
    import onnxruntime

    folder, path = saved("masked"), tmp_path / "new" / "model.onnx"
    assert main(["export", folder, str(path), "--format", "onnx"]) == 0
    printed = capsys.readouterr().out
    assert "PyTorch" in printed
    assert "ms per image" in printed
    pixels = torch.randn(3, 3, 56, 40)
    session = onnxruntime.InferenceSession(path)
    assert [one.name for one in session.get_outputs()] == ["pooler_output", "last_hidden_state"]
    (pooled, states) = session.run(None, {"pixel_values": pixels.numpy()})
    with torch.no_grad():
        expected = BigBirdViTModel.from_pretrained(folder).eval()(pixels)
    np.testing.assert_allclose(pooled, expected.pooler_output.numpy(), atol=1e-4)
    np.testing.assert_allclose(states, expected.last_hidden_state.numpy(), atol=1e-4)


def test_eight_bits_cost_something_and_it_is_said(saved, tmp_path):
    small = export(saved("masked"), tmp_path / "small.onnx", format="onnx", int8=True)
    assert TOLERANCE < small.difference < 1  # a program of all bits is not written with more than that
    assert 0.9 < small.cosine < 1 - 1e-6


def test_a_program_that_gives_something_else_is_not_written(saved, tmp_path, monkeypatch):
    import hf_vicreg.export as module

    run = module._run_program

    def wrong(path, pixels):
        found, seconds = run(path, pixels)
        found["7/0"] = found["7/0"] + 2 * TOLERANCE
        return found, seconds

    monkeypatch.setattr(module, "_run_program", wrong)
    with pytest.raises(ValueError, match="`format`: expected a program equal to the model"):
        export(saved("masked"), tmp_path / "model.pt2", format="torch")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("MODEL out.onnx --format tflite", "`format`: expected one of onnx, torch"),
        ("MODEL out.pt2 --format onnx", "`OUT`: expected a file ending in .onnx"),
        ("MODEL out.onnx --format onnx --height 50", "`height`: expected a multiple of the patch of 8 pixels, got 50"),
        ("MODEL out.pt2 --format torch --int8", "`int8`: expected --format onnx beside it"),
        ("MODEL out.pt2 --format torch --task words", "`task`: expected one of features"),
        ("MODEL out.pt2 --format torch --images nothing", "`images`: expected a folder with images"),
        ("nowhere out.pt2 --format torch", "`MODEL`: expected the folder or Hub id"),
    ],
)
def test_bad_input_is_one_line(saved, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    given = arguments.replace("MODEL", saved("masked")).split()
    assert main(["export", *given]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_named(saved, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.raises(ValueError, match=r"expected onnxruntime to be installed for 'onnx'; pip install"):
        export(saved("masked"), tmp_path / "model.onnx", format="onnx")
