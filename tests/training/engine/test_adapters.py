"""Low-rank adapters: what they compute, that they alone learn, that they resume, and the forms they are kept in."""

import copy
import shutil
import sys

import datasets
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification, ResNetConfig, ResNetModel

from hf_vicreg import BigBirdViTConfig, BigBirdViTImageProcessor, BigBirdViTModel, pretrain
from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.publishing.staging import stage
from hf_vicreg.training.engine.encoders import add_adapters, merge_adapters
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.arguments import FinetuneArguments
from hf_vicreg.training.pretrained.companions import add_companions
from hf_vicreg.training.pretrained.warm_start import with_source
from hf_vicreg.training.run.resolve import resolve
from hf_vicreg.training.tasks.arguments import CaptioningArguments, DetectionArguments
from hf_vicreg.training.tasks.captioning.command import finetune_captioning
from hf_vicreg.training.tasks.classification.command import finetune_classification
from hf_vicreg.training.tasks.detection.model import build_detector

# peft's wrapper asks models for it by its old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Folder of an encoder whose every tensor counts."""
    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(1)
    config = BigBirdViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        tile_size=1,
    )
    encoder = BigBirdViTModel(config)
    with torch.no_grad():
        for tensor in encoder.parameters():
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
    encoder.save_pretrained(folder)
    BigBirdViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def load(folder):
    return AutoModel.from_pretrained(folder).eval()


@torch.no_grad()
def pooled(model):
    return model(PIXELS).pooler_output


def test_adapters_are_a_product_of_thin_matrices_that_alone_learns(source):
    plain = load(source)
    encoder = copy.deepcopy(plain)
    add_adapters(encoder, 4)
    assert torch.equal(pooled(encoder), pooled(plain))
    encoder(PIXELS).pooler_output.square().sum().backward()
    learning = {name for name, one in encoder.named_parameters() if one.grad is not None}
    assert learning == {name for name, _ in encoder.named_parameters() if "lora_" in name}
    assert len(learning) == 2 * 2 * 6  # two matrices, two layers, query, key, value, output and two of the MLP
    torch.manual_seed(2)
    expected = plain.state_dict()
    with torch.no_grad():
        for name, layer in encoder.named_modules():
            if hasattr(layer, "lora_A"):
                thin, wide = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                wide.copy_(torch.randn_like(wide))
                expected[f"{name}.weight"] = expected[f"{name}.weight"] + wide @ thin
    before = pooled(encoder)
    plain.load_state_dict(expected)
    torch.testing.assert_close(before, pooled(plain), atol=1e-4, rtol=1e-4)
    merge_adapters(encoder)
    assert list(encoder.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(encoder.state_dict(), plain.state_dict())
    assert all(one.requires_grad for one in encoder.parameters())


@pytest.mark.parametrize("ema_decay", [0.0, 0.9], ids=["weights", "average"])
def test_a_run_of_adapters_resumes_and_is_kept_whole_and_alone(source, tiny_recipe, image_folder, tmp_path, ema_decay):
    del tiny_recipe["model"]
    data = image_folder(32)
    settings = tiny_recipe | {"batch_size": 16, "num_train_epochs": 2, "checkpointing_steps": 2}
    settings |= {"model_name_or_path": str(source), "lora_rank": 2, "ema_decay": ema_decay}
    whole = pretrain(out=tmp_path / "whole", data=data, **settings)
    exported = load(tmp_path / "whole")
    before, after = load(source).state_dict(), exported.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
    }
    assert whole.results["encoder_parameters"] == exported.num_parameters()
    alone = PeftModel.from_pretrained(load(source), tmp_path / "whole" / "adapter").eval()
    torch.testing.assert_close(pooled(alone), pooled(exported), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled(whole.encoder.eval()), pooled(exported))
    wrapped = load_file(tmp_path / "whole" / "pretraining" / "model.safetensors")
    assert not [name for name in wrapped if "lora" in name]
    if not ema_decay:
        torch.testing.assert_close({name: wrapped[f"encoder.{name}"] for name in after}, dict(after))

    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step_00000004")
    shutil.rmtree(tmp_path / "again" / "adapter")
    pretrain(out=tmp_path / "again", data=data, resume_from_checkpoint="latest", **settings)
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file

    (tmp_path / "staged").mkdir()
    staged = stage(tmp_path / "whole", tmp_path / "staged", repo="owner/name")
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} < set(staged.names)
    assert 'subfolder="adapter"' in staged.card
    assert str(tmp_path) not in (tmp_path / "staged" / "adapter" / "adapter_config.json").read_text()


def test_a_copy_that_follows_the_encoder_has_its_adapters(source, tmp_path):
    settings = {"model_name_or_path": str(source), "lora_rank": 2, "objective": "byol", "dataset_name": "digits"}
    settings |= {"output_dir": str(tmp_path), "vicreg": {"expander_sizes": [8, 8]}}
    config = resolve(with_source(settings))
    model = VicRegForPreTraining(config.vicreg)
    add_companions(model, config)
    model.begin_step(0, 10)
    (teacher,) = model.objective.teachers
    torch.testing.assert_close(teacher.state_dict(), model.encoder.state_dict(), rtol=0, atol=0)
    assert not any(one.requires_grad for one in teacher.parameters())
    model.end_step()
    merge_adapters(model)
    assert not [name for name in model.state_dict() if "lora" in name]


def walls(folder):
    """A data set of red and blue walls, with labels and captions."""
    images = [Image.new("RGB", (36, 36), colour) for colour in [(220, 40, 40), (40, 40, 220)] * 4]
    columns = {"image": images, "label": [0, 1] * 4, "text": ["a red wall", "a blue wall"] * 4}
    split = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    split = split.cast_column("label", datasets.ClassLabel(names=["red", "blue"]))
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(folder)
    return str(folder)


def test_tasks_train_adapters_beside_their_heads(source, tmp_path):
    data, before = walls(tmp_path / "data"), load(source)
    flags = {"dataset_name": data, "max_steps": 2, "batch_size": 4, "lora_rank": 2, "mixed_precision": "no"}
    classifier = tmp_path / "classifier"
    finetune_classification(str(source), FinetuneArguments(output_dir=str(classifier), learning_rate=0.01, **flags))
    captioner = tmp_path / "captioner"
    small = {"decoder_hidden_size": 32, "decoder_layers": 1, "output_dir": str(captioner), "learning_rate": 0.01}
    finetune_captioning(str(source), CaptioningArguments(**flags | small))
    tuned = AutoModelForImageClassification.from_pretrained(classifier).eval()
    for encoder, folder in ((tuned.base_model, classifier), (None, captioner)):
        weights = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert len(weights) == 24
        alone = PeftModel.from_pretrained(load(source), folder / "adapter").eval()
        assert not torch.allclose(pooled(alone), pooled(before), atol=1e-4)
        if encoder is not None:
            torch.testing.assert_close(pooled(encoder), pooled(alone), atol=1e-5, rtol=1e-5)
            assert torch.equal(encoder.layernorm.weight, before.layernorm.weight)
    assert not [name for name in load_file(captioner / "model.safetensors") if "lora" in name]

    detector = build_detector(str(source), ["cell"], DetectionArguments(d_model=32, lora_rank=2))
    learning = {name for name, one in detector.model.backbone.named_parameters() if one.requires_grad}
    assert learning
    assert all("lora_" in name for name in learning)
    merge_adapters(detector)
    assert not [name for name in detector.state_dict() if "lora" in name]


def test_what_has_no_adapters_is_refused(source, tiny_recipe, image_folder, tmp_path, monkeypatch):
    del tiny_recipe["model"]
    settings = tiny_recipe | {"out": tmp_path / "run", "data": image_folder(32), "batch_size": 16, "lora_rank": 2}
    with pytest.raises(InputError, match=r"`lora_rank`: expected a `model_name_or_path` beside it, got none"):
        pretrain(**settings)
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).save_pretrained(tmp_path / "net")
    with pytest.raises(InputError, match=r"`lora_rank`: expected an encoder with linear layers, a 'resnet' has none"):
        pretrain(model_name_or_path=str(tmp_path / "net"), views={"image_size": 32}, **settings)
    with pytest.raises(InputError, match=r"`lora_rank`: expected at least 0, got -1"):
        pretrain(model_name_or_path=str(source), **settings | {"lora_rank": -1})
    flags = {"dataset_name": "x", "output_dir": str(tmp_path / "out"), "lora_rank": 2}
    with pytest.raises(InputError, match=r"`lora_rank`: expected a pretrained encoder that learns, got --freeze_enc"):
        finetune_classification(str(source), FinetuneArguments(freeze_encoder=True, **flags))
    with pytest.raises(
        InputError, match=r"`lora_rank`: expected a pretrained encoder that learns, got --from_scratch"
    ):
        finetune_captioning(str(source), CaptioningArguments(from_scratch=True, **flags))
    monkeypatch.setitem(sys.modules, "peft", None)  # as where it is not installed
    with pytest.raises(InputError, match=r"`lora_rank`: expected the package `peft`, it is not installed; pip"):
        pretrain(model_name_or_path=str(source), **settings)
    assert not (tmp_path / "run").exists()
