"""Models of many channels: warm starts, resuming, embedding, evaluating and fine-tuning them."""

import json
import logging
from io import BytesIO

import datasets
import numpy as np
import pytest
import tifffile
import torch
from transformers import AutoImageProcessor, ViTConfig, ViTImageProcessor, ViTModel

from hf_vicreg import BigBirdViTModel, embed, pretrain
from hf_vicreg.cli import main
from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.publishing.staging import stage
from hf_vicreg.training.errors import InputError, RunStopped
from hf_vicreg.training.evaluation.arguments import ImageTextArguments
from hf_vicreg.training.image_text.evaluate import evaluate_image_text
from hf_vicreg.training.pretrained.companions import add_companions
from hf_vicreg.training.pretrained.source_encoder import inflated_weights
from hf_vicreg.training.run.resolve import resolve

CHANNELS = 4
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SHAPE |= {"image_size": 16, "patch_size": 8}
FLAGS = {"vicreg": {"expander_sizes": [16, 16]}, "batch_size": 4, "device": "cpu", "knn_every_epochs": 0}


def encoded(number):
    """A TIFF of 16 bits whose last channel is bright in every other image."""
    pixels = np.random.default_rng(number).integers(0, 1000, (24, 28, CHANNELS)).astype(np.uint16)
    pixels[:, :, -1] += 3000 * (number % 2)
    buffer = BytesIO()
    tifffile.imwrite(buffer, pixels, planarconfig="contig", photometric="minisblack")
    return buffer.getvalue(), pixels


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder `images`, the same labelled as the dataset `table`, and a run `run` on `images`."""
    root = tmp_path_factory.mktemp("channels")
    (root / "images").mkdir()
    for number in range(8):
        (root / "images" / f"{number}.tif").write_bytes(encoded(number)[0])
    names = datasets.ClassLabel(names=["dim", "bright"])
    features = datasets.Features({"image": datasets.Image(), "label": names, "text": datasets.Value("string")})
    for split, numbers in (("train", range(16)), ("test", range(16, 24))):
        rows = {
            "image": [{"bytes": encoded(one)[0], "path": None} for one in numbers],
            "label": [one % 2 for one in numbers],
            "text": [("dim", "bright")[one % 2] for one in numbers],
        }
        (root / "table").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(root / "table" / f"{split}.parquet")
    model = SHAPE | {"num_channels": CHANNELS}
    pretrain(out=root / "run", data=root / "images", model=model, max_steps=2, **FLAGS)
    return root


def test_embeddings_and_knn_are_of_all_channels(place, tmp_path):
    found = embed(place / "images", place / "run", tmp_path / "features", device="cpu")
    model, processor = (
        BigBirdViTModel.from_pretrained(place / "run"),
        AutoImageProcessor.from_pretrained(place / "run"),
    )
    with torch.no_grad():
        pixels = processor([str(place / "images" / f"{one}.tif") for one in range(8)], return_tensors="pt")
        expected = model.eval()(**pixels).pooler_output
    np.testing.assert_allclose(np.array(found["embedding"]), expected, atol=1e-5)
    assert found[0]["height"] == 24
    words = ["evaluate", "knn", str(place / "run"), "--dataset_name", str(place / "table"), "--neighbours", "3"]
    assert not main([*words, "--output_dir", str(tmp_path / "knn")])
    results = json.loads((tmp_path / "knn" / "results.json").read_text())
    assert "1.0" in json.dumps(results)  # the bright channel is seen


def test_a_resumed_run_keeps_what_was_measured(place, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(8):
        (images / f"{number}.tif").write_bytes(encoded(number)[0])
    flags = FLAGS | {"model": SHAPE | {"num_channels": CHANNELS}, "data": images, "checkpointing_steps": 2}
    whole = pretrain(out=tmp_path / "whole", max_steps=4, **flags)
    with pytest.raises(RunStopped):
        pretrain(out=tmp_path / "half", max_steps=4, max_time=1e-6, **flags)
    resumed = pretrain(out=tmp_path / "half", max_steps=4, resume_from_checkpoint="latest", **flags)
    assert resumed.processor.to_dict() == whole.processor.to_dict()
    for one, other in zip(resumed.encoder.parameters(), whole.encoder.parameters(), strict=True):
        assert torch.equal(one, other)


def test_captions_of_many_channels_are_trained_and_measured(place, tmp_path):
    texts = {"model_type": "distilbert", "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "vocab_size": 300}
    given = {"model": SHAPE | {"num_channels": CHANNELS}, "caption_column": ["text"], "second_model": texts}
    run = pretrain(out=tmp_path / "run", data=place / "table", max_steps=1, **given, **FLAGS)
    arguments = ImageTextArguments(str(place / "table"), caption_column=["text"], output_dir=str(tmp_path))
    metrics = evaluate_image_text(str(run.output_dir), arguments)["metrics"]
    assert metrics == pytest.approx(run.results["image_text"])


def test_a_teacher_sees_values_as_it_was_trained_on_them(place, tmp_path):
    config = resolve(
        FLAGS
        | {"train_dir": str(place / "images"), "output_dir": str(tmp_path), "teacher": str(place / "run")}
        | {"model": SHAPE | {"num_channels": CHANNELS}, "normalisation": ["fixed", "0", "65535"]}
        | {"views": {"channel_low": 0.0, "channel_high": 65535.0, "image_mean": 0.5, "image_std": 0.25}}
    )
    model = VicRegForPreTraining(config.vicreg)
    add_companions(model, config)
    processor = AutoImageProcessor.from_pretrained(place / "run")
    low, high, mean, std = (
        np.array(getattr(processor, one)) for one in ("channel_low", "channel_high", "image_mean", "image_std")
    )
    value = low + 0.3 * (high - low)
    own = torch.tensor((value / 65535 - 0.5) / 0.25)[:, None, None]
    seen = (own * model.objective.scale + model.objective.shift).flatten()
    torch.testing.assert_close(seen.float(), torch.tensor((0.3 - mean) / std).float(), rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    ViTModel(ViTConfig(**SHAPE)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def test_an_inflated_layer_embeds_equal_channels_as_before():
    weights = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for channels in (1, 2, 5, 64):
        inflated = inflated_weights(weights, torch.empty(8, channels, 4, 4))
        plane = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(1))
        before = torch.nn.functional.conv2d(plane.expand(-1, 3, -1, -1), weights)
        after = torch.nn.functional.conv2d(plane.expand(-1, channels, -1, -1), inflated)
        torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-5)
    assert inflated_weights(weights, torch.empty(8, 3, 4, 4)) is None
    assert inflated_weights(weights, torch.empty(8, 5, 2, 2)) is None


def test_a_model_of_rgb_is_the_start_of_one_of_more_channels(place, vit, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        done = pretrain(
            out=tmp_path / "run",
            data=place / "images",
            model_name_or_path=str(vit),
            model={"num_channels": CHANNELS},
            max_steps=1,
            learning_rate=0.0,
            **FLAGS,
        )
    weights = done.encoder.embeddings.patch_embeddings.projection.weight
    source = ViTModel.from_pretrained(vit).embeddings.patch_embeddings.projection.weight
    torch.testing.assert_close(weights.detach(), source.detach().mean(1, keepdim=True).repeat(1, 4, 1, 1) * 3 / 4)
    assert len(done.processor.channel_low) == CHANNELS
    again = pretrain(
        out=tmp_path / "again", data=place / "images", model_name_or_path=str(tmp_path / "run"), max_steps=1, **FLAGS
    )
    assert again.processor.channel_low == done.processor.channel_low  # its own, not measured anew


@pytest.mark.slow
def test_a_classifier_of_many_channels(place, tmp_path):
    words = ["finetune", "classification", str(place / "run"), "--dataset_name", str(place / "table")]
    words += ["--output_dir", str(tmp_path / "tuned"), "--num_train_epochs", "30", "--learning_rate", "1e-2"]
    assert not main([*words, "--batch_size", "8"])
    results = json.loads((tmp_path / "tuned" / "results.json").read_text())
    assert json.dumps(results).count('"accuracy": 1.0') == 1


def test_a_stream_has_no_windows(place, tmp_path):
    with pytest.raises(InputError, match=r"`window`: expected a folder of image files to read by windows"):
        pretrain(
            out=tmp_path / "run",
            data=place / "table",
            model=SHAPE | {"num_channels": CHANNELS},
            max_steps=1,
            streaming=True,
            window=64,
            **FLAGS,
        )
    assert not (tmp_path / "run").exists()


def test_the_card_of_a_run_of_many_channels_says_what_images_are(place, tmp_path):
    stage(place / "run", tmp_path, repo="lab/demo")
    card = (tmp_path / "README.md").read_text()
    assert f"`images` is a list of file names, or of arrays of {CHANNELS} channels." in card


@pytest.mark.slow  # the checks, in processes of their own, take ten seconds
def test_a_run_of_many_channels_can_be_published(place, capsys):
    assert main(["publish", str(place / "run"), "--repo", "lab/demo", "--dry_run"]) == 0
    assert "README.md" in capsys.readouterr().out
