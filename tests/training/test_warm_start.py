"""Warm starts: every kind of source, named by the flag, begins with its own features, resumes and is exported."""

import json
import logging
import shutil

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BertConfig,
    BertModel,
    BitImageProcessor,
    ConvNextConfig,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_vicreg import BigBirdViTConfig, BigBirdViTModel, pretrain
from hf_vicreg.modeling.encoder_outputs import encoder_outputs, pooled_features
from hf_vicreg.training.engine.unseen import unseen_parameters
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.finishing import fit
from hf_vicreg.training.images.colour import NEUTRAL, finish_views
from hf_vicreg.training.pretrain import main
from hf_vicreg.training.pretrained import warm_start
from hf_vicreg.training.run.processors import build_processor
from hf_vicreg.training.run.resolve import resolve

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
WIDE = SHAPE | {"intermediate_size": 48}
STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}
SOURCES = {
    "run": lambda: BigBirdViTModel(BigBirdViTConfig(tile_size=1, drop_path_rate=0.2, **WIDE)),
    "run-absolute": lambda: BigBirdViTModel(BigBirdViTConfig(position_embedding_type="absolute", tile_size=1, **WIDE)),
    "vit": lambda: ViTModel(ViTConfig(**WIDE)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SHAPE)),
    "registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(num_register_tokens=2, **SHAPE)),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(num_register_tokens=2, **WIDE)),
    "dinov3-convnext": lambda: DINOv3ConvNextModel(DINOv3ConvNextConfig(image_size=32, **STAGES)),
    "resnet": lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
    "convnext": lambda: ConvNextModel(ConvNextConfig(image_size=32, **STAGES)),
    "swin": lambda: SwinModel(
        SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=32, patch_size=4)
    ),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**WIDE)),
    "siglip-with-text": lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=WIDE)),
}
QUICK = ("run", "vit", "dinov3", "resnet", "siglip")  # in every run of the tests; the others are slow
MEAN, STD = [0.4, 0.5, 0.6], [0.3, 0.25, 0.2]


def save_source(name, folder):
    """Save a source whose every tensor counts, with a processor of its own; return it."""
    torch.manual_seed(1)
    source = SOURCES[name]().eval()
    with torch.no_grad():
        for tensor in source.parameters():
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
    source.save_pretrained(folder)
    side = {"height": 32, "width": 32}
    BitImageProcessor(size=side, crop_size=side, image_mean=MEAN, image_std=STD).save_pretrained(folder)
    return getattr(source, "vision_model", source)


@torch.no_grad()
def features(encoder, pixel_values):
    return pooled_features(encoder_outputs(encoder.eval(), {"pixel_values": pixel_values}))


class Begun(BaseException):
    """Stops a run before its first step."""


@pytest.fixture
def before_step_1(monkeypatch):
    """Returns a function that starts a run and returns it as it is before its first step."""

    def start(**settings):
        def begun(run):
            start.run = run
            raise Begun

        with monkeypatch.context() as patched:
            patched.setattr("hf_vicreg.training.pretrain.fit", begun)
            with pytest.raises(Begun):
                pretrain(**settings)
        return start.run

    return start


@pytest.fixture
def settings(tiny_recipe):
    """Of a run that takes seconds, without an encoder."""
    del tiny_recipe["model"]
    return tiny_recipe | {"batch_size": 16}


@pytest.mark.parametrize(
    "name", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in SOURCES]
)
def test_every_source_begins_resumes_and_exports(name, tmp_path, settings, image_folder, monkeypatch):
    source = save_source(name, tmp_path / "source")
    data, settings = image_folder(32), settings | {"num_train_epochs": 2, "checkpointing_steps": 2}
    settings |= {"model_name_or_path": str(tmp_path / "source"), "views": {"image_size": 32}}
    pixel_values, first = torch.randn(3, 3, 32, 32), []

    def watched(run):
        first.append(features(run.model.encoder, pixel_values))
        fit(run)

    monkeypatch.setattr("hf_vicreg.training.pretrain.fit", watched)
    whole = pretrain(out=tmp_path / "whole", data=data, **settings)
    torch.testing.assert_close(first[0], features(source, pixel_values), atol=1e-5, rtol=1e-5)
    assert type(whole.encoder) is type(source)
    assert whole.results["steps"] == 4
    moved = features(whole.encoder, pixel_values) - features(source, pixel_values)
    assert moved.abs().max() > 1e-4  # it was trained
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step_00000004")
    shutil.rmtree(tmp_path / "source")  # which a resumed run does not need
    again = pretrain(out=tmp_path / "again", data=data, resume_from_checkpoint="latest", **settings)
    for key, tensor in whole.encoder.state_dict().items():
        assert torch.equal(again.encoder.state_dict()[key], tensor), key

    processor, model = (
        AutoImageProcessor.from_pretrained(tmp_path / "whole"),
        AutoModel.from_pretrained(tmp_path / "whole"),
    )
    assert (list(processor.image_mean), list(processor.image_std)) == (MEAN, STD)
    pixels = processor([Image.new("RGB", (40, 30), (9, 5, 200))], return_tensors="pt")
    found, expected = (features(one, pixels["pixel_values"]) for one in (model, whole.encoder))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert pooled_features(model(**pixels)).shape == expected.shape  # without a word on the size


@pytest.mark.parametrize("name", ["run-absolute", "vit", "dinov2", "registers", "dinov3", "siglip", "swin", "resnet"])
def test_positions_are_resampled_to_another_size(name, tmp_path, settings, image_folder, before_step_1, caplog):
    source = save_source(name, tmp_path / "source")
    # transformers' DINOv2 and SigLIP have square tables alone
    height, width = (48, 48) if name in ("dinov2", "registers", "siglip") else (48, 64)
    size = height if height == width else [height, width]
    settings |= {"model_name_or_path": str(tmp_path / "source"), "views": {"image_size": size}}
    with caplog.at_level(logging.INFO, logger="hf_vicreg"):
        begun = before_step_1(out=tmp_path / "run", data=image_folder(32), **settings)
    pixel_values = torch.randn(3, 3, height, width)
    found, expected = (features(one, pixel_values) for one in (begun.model.encoder, source))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert begun.config.image_size == (height, width)
    if name == "resnet":
        return
    table = {"run-absolute": "position_embeddings", "siglip": "position_embedding.weight"}
    table |= dict.fromkeys(("vit", "dinov2", "registers"), "position_embeddings")
    said = (
        f"positions are resampled: embeddings.{table[name]}" if name in table else "no table of positions to resample"
    )
    assert f"images are of ({height}, {width}) pixels, the source's of (32, 32); {said}" in caplog.text.replace(
        "vision_model.", ""
    )


def test_pixels_of_training_are_those_of_the_saved_processor(tmp_path, settings):
    save_source("vit", tmp_path / "source")
    given = settings | {"output_dir": str(tmp_path / "run"), "dataset_name": "digits"}
    config = resolve(warm_start.with_source(given | {"model_name_or_path": str(tmp_path / "source")}))
    crops = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    trained = finish_views(crops, torch.tensor([NEUTRAL] * 4), config.normalisation)
    images = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in crops]
    saved, own = build_processor(config), AutoImageProcessor.from_pretrained(tmp_path / "source")
    for processor in (saved, own):
        torch.testing.assert_close(
            processor(images, return_tensors="pt")["pixel_values"], trained, atol=1e-5, rtol=1e-5
        )


def test_a_step_sees_the_pixels_of_the_saved_processor(tmp_path, settings, before_step_1):
    save_source("vit", tmp_path / "source")
    (tmp_path / "images").mkdir()
    for index in range(32):
        Image.new("RGB", (32, 32), (9, 5, 200)).save(tmp_path / "images" / f"{index}.png")
    plain = {"jitter_probability": 0, "grayscale_probability": 0, "blur_probability": 0, "solarize_probability": 0}
    settings |= {"model_name_or_path": str(tmp_path / "source"), "views": plain, "batch_size": 32}
    begun = before_step_1(out=tmp_path / "run", data=tmp_path / "images", **settings)
    seen = []
    begun.model.encoder.register_forward_pre_hook(lambda *one: seen.append(one[2]["pixel_values"]), with_kwargs=True)
    begun.loop.step.backward([next(iter(begun.loop.step.batches(0)))], 0)
    expected = begun.processor([Image.new("RGB", (40, 50), (9, 5, 200))], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(seen[0], expected.expand_as(seen[0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("stored", "mean", "std"),
    [
        ({"do_normalize": False}, [0.0] * 3, [1.0] * 3),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, [0.5] * 3, [0.5] * 3),
        ({"do_rescale": False, "do_normalize": False}, [0.0] * 3, [1 / 255] * 3),
    ],
    ids=["plain", "other-scale", "bytes"],
)
def test_other_ways_to_normalise_become_a_mean_and_a_deviation(stored, mean, std, tmp_path, settings):
    save_source("vit", tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | stored))
    given = settings | {"output_dir": str(tmp_path / "run"), "dataset_name": "digits"}
    given["model_name_or_path"] = str(tmp_path)
    views = warm_start.with_source(given)["views"]
    assert views["image_mean"] == pytest.approx(mean)
    assert views["image_std"] == pytest.approx(std)
    # what is given wins
    assert warm_start.with_source(given | {"views": {"image_mean": 0.1}})["views"]["image_mean"] == 0.1


def test_a_run_and_its_pretraining_folder_are_sources(tmp_path, tiny_recipe, image_folder, before_step_1):
    data = image_folder(32)
    first = pretrain(
        out=tmp_path / "first", data=data, **tiny_recipe | {"views": {"image_mean": 0.3, "image_std": 0.2}}
    )
    del tiny_recipe["model"]
    pixel_values = torch.randn(3, 3, 32, 32)
    for place in (tmp_path / "first", tmp_path / "first" / "pretraining"):
        name = place.name
        begun = before_step_1(out=tmp_path / f"from-{name}", data=data, model_name_or_path=str(place), **tiny_recipe)
        assert torch.equal(features(begun.model.encoder, pixel_values), features(first.encoder, pixel_values))
        assert begun.config.normalisation == ([0.3] * 3, [0.2] * 3)
        assert begun.model.encoder.config.drop_path_rate == 0.2
    # the pattern, dropout and image size are open
    changed = {"tile_size": 2, "drop_path_rate": 0.1, "image_size": 48}
    begun = before_step_1(
        out=tmp_path / "changed", data=data, model=changed, model_name_or_path=str(tmp_path / "first"), **tiny_recipe
    )
    assert {key: getattr(begun.model.encoder.config, key) for key in changed} == changed


def test_a_run_killed_before_its_first_checkpoint_reads_the_source_again(
    tmp_path, settings, image_folder, before_step_1
):
    source = save_source("vit", tmp_path / "source")
    data, settings = image_folder(32), settings | {"model_name_or_path": str(tmp_path / "source")}
    before_step_1(out=tmp_path / "run", data=data, **settings)
    again = before_step_1(out=tmp_path / "run", data=data, resume_from_checkpoint="latest", **settings)
    pixel_values = torch.randn(3, 3, 32, 32)
    assert torch.equal(features(again.model.encoder, pixel_values), features(source, pixel_values))


def test_a_stored_recipe_starts_the_same_run_anew(tmp_path, settings, image_folder, before_step_1, monkeypatch):
    save_source("dinov2", tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    data = image_folder(32)
    first = before_step_1(out=tmp_path / "first", data=data, model_name_or_path="source", **settings)
    stored = yaml.safe_load((tmp_path / "first" / "recipe.yaml").read_text())
    assert first.config.to_recipe() == stored
    assert stored["model_name_or_path"] == str(tmp_path / "source")
    again = before_step_1(out=tmp_path / "again", data=data, config=tmp_path / "first" / "recipe.yaml")
    assert again.config.to_recipe() | {"output_dir": ""} == stored | {"output_dir": ""}


def test_a_recipes_encoder_gives_way_to_the_source(tmp_path, image_folder, before_step_1, caplog):
    save_source("resnet", tmp_path / "source")
    with caplog.at_level(logging.INFO, logger="hf_vicreg"):
        begun = before_step_1(
            out=tmp_path / "run",
            data=image_folder(32),
            config="digits",
            batch_size=16,
            num_train_epochs=1,
            model_name_or_path=str(tmp_path / "source"),
        )
    assert begun.model.encoder.config.model_type == "resnet"
    assert begun.config.image_size == (32, 32)
    assert "`model.hidden_size`" in caplog.text


SIZES = {
    "as the source has them": ({}, 24, 40),
    "views": ({"views": {"image_size": 32}}, 32, 32),
    "model": ({"model": {"image_size": 32}}, 32, 32),
    "both": ({"views": {"image_size": 16}, "model": {"image_size": 24}}, 16, 24),
    "recipe": ({"config": "recipe.yaml"}, 16, 32),
    "recipe, views": ({"config": "recipe.yaml", "views": {"image_size": 24}}, 24, 24),
}


@pytest.mark.parametrize("case", SIZES)
def test_a_source_used_with_larger_images_than_its_views(case, tmp_path, settings, image_folder, before_step_1):
    given, views, used = SIZES[case]
    two_sizes(tmp_path / "source")
    (tmp_path / "recipe.yaml").write_text("views: {image_size: 16}\nmodel: {hidden_size: 8, image_size: 32}")
    given = given | ({"config": tmp_path / "recipe.yaml"} if "config" in given else {})
    settings |= {"data": image_folder(32), "model_name_or_path": str(tmp_path / "source")} | given
    begun = before_step_1(out=tmp_path / "run", **settings)
    assert (begun.config.image_size, begun.config.used_image_size) == ((views, views), (used, used))
    assert begun.model.encoder.config.hidden_size == 32


def two_sizes(folder, recipe="views: {image_size: 24}"):
    """Save a source that is used with images of 40 pixels, and learned from views of 24 as its recipe says."""
    save_source("run", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_size": 40}))
    (folder / "recipe.yaml").write_text(recipe)
    return str(folder)


def test_a_teacher_sees_views_at_the_size_it_learned_from(tmp_path, tiny_recipe, image_folder, before_step_1):
    teacher = two_sizes(tmp_path / "teacher")
    begun = before_step_1(out=tmp_path / "run", data=image_folder(32), teacher=teacher, **tiny_recipe)
    assert begun.model.objective.image_size == (24, 24)


@pytest.mark.parametrize("recipe", ["views: [1]", "{bitrate: 4", "views: {image_size: large}"])
def test_a_recipe_that_says_no_size_leaves_that_of_use(
    recipe, tmp_path, settings, image_folder, before_step_1, caplog
):
    settings["model_name_or_path"] = two_sizes(tmp_path / "source", recipe)
    begun = before_step_1(out=tmp_path / "run", data=image_folder(32), **settings)
    assert begun.config.image_size == begun.config.used_image_size == (40, 40)
    assert "says no size of its views" in caplog.text


def test_a_foreign_recipe_beside_a_dense_source_is_not_read(tmp_path, settings, image_folder, before_step_1):
    save_source("vit", tmp_path / "source")
    (tmp_path / "source" / "recipe.yaml").write_text("!Modifier {")
    settings |= {"model_name_or_path": str(tmp_path / "source"), "sparse": True}
    assert before_step_1(out=tmp_path / "run", data=image_folder(32), **settings).config.image_size == (32, 32)


@pytest.mark.parametrize("sizes", ["of two sizes", "of one size"])
def test_a_resumed_warm_start_keeps_the_size_that_is_not_given(sizes, tmp_path, settings, image_folder):
    source, views, used = tmp_path / "source", 24, 40
    if sizes == "of two sizes":
        two_sizes(source)
    else:
        save_source("run", source)
        views = used = 32
    settings |= {"out": tmp_path / "run", "data": image_folder(32), "model_name_or_path": str(source)}
    pretrain(**settings)
    for given, expected in (
        ({"model": {"image_size": 48}}, [views, 48]),
        ({"views": {"image_size": views}}, [views, 48]),
    ):
        pretrain(**settings, **given, resume_from_checkpoint="latest")
        stored = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
        assert [stored["views"]["image_size"], stored["model"]["image_size"]] == expected
    assert used != 48


def test_pretraining_of_a_run_of_two_sizes_has_its_views(tmp_path, tiny_recipe, image_folder, before_step_1):
    tiny_recipe["views"] = {"image_size": 24}
    first, data = tmp_path / "first", image_folder(32)
    pretrain(out=first, data=data, **tiny_recipe)
    assert AutoModel.from_pretrained(first).config.image_size == 32
    del tiny_recipe["model"], tiny_recipe["views"]
    source = str(first / "pretraining")
    begun = before_step_1(out=tmp_path / "run", data=data, model_name_or_path=source, **tiny_recipe)
    assert (begun.config.image_size, begun.config.used_image_size) == ((24, 24), (32, 32))


def test_other_encoders_have_the_size_of_the_views(tmp_path, settings, image_folder, before_step_1, caplog):
    save_source("vit", tmp_path / "source")
    (tmp_path / "recipe.yaml").write_text("views: {image_size: 16}\nmodel: {image_size: 32}")
    settings |= {"data": image_folder(32), "model_name_or_path": str(tmp_path / "source")}
    with caplog.at_level(logging.INFO, logger="hf_vicreg"):
        begun = before_step_1(out=tmp_path / "run", config=tmp_path / "recipe.yaml", **settings)
    assert begun.config.image_size == begun.config.used_image_size == (16, 16)
    assert "`model.image_size` 32 is left out: only a bigbird_vit has two sizes" in caplog.text


def test_a_plan_keeps_the_encoder_it_is_given(tmp_path, image_folder, capsys):
    save_source("run", tmp_path / "source")
    pretrain(data=image_folder(32), model_name_or_path=str(tmp_path / "source"), plan_only=True, time_budget="5m")
    printed = capsys.readouterr().out
    assert "32 wide, 2 layers" in printed
    assert "32 x 32 pixels" in printed


def test_nothing_of_this_machine_is_in_the_card(tmp_path, settings, image_folder):
    save_source("vit", tmp_path / "source")
    pretrain(out=tmp_path / "run", data=image_folder(32), model_name_or_path=str(tmp_path / "source"), **settings)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| began with | the weights of `source` |" in card
    assert " --model_name_or_path FOLDER_OF_AN_ENCODER --output_dir" in card
    assert "The author's `source` was a folder on a disk" in card
    assert str(tmp_path) not in card


def test_a_vit_without_a_pooler_begins_with_a_new_one(tmp_path, settings, image_folder, before_step_1, caplog):
    source = ViTForImageClassification(ViTConfig(**WIDE)).eval()
    source.save_pretrained(tmp_path / "source")
    begun = before_step_1(
        out=tmp_path / "run", data=image_folder(32), model_name_or_path=str(tmp_path / "source"), **settings
    )
    pixel_values = torch.randn(2, 3, 32, 32)
    found = begun.model.encoder.eval()(pixel_values).last_hidden_state
    torch.testing.assert_close(found, source.vit(pixel_values).last_hidden_state, atol=1e-5, rtol=1e-5)
    assert "source has no weights for its pooler, which begins at random" in caplog.text
    assert "source has no image processor" in caplog.text


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Sources good and bad."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("vit", "dinov2", "resnet", "swin", "run"):
        save_source(name, folder / name)
    BertModel(BertConfig(**TEXT)).save_pretrained(folder / "bert")
    for name, key in (("no-norm", "layernorm.weight"), ("no-blocks", "embeddings.cls_token")):
        shutil.copytree(folder / "vit", folder / name)
        file = folder / name / "model.safetensors"
        save_file({one: tensor for one, tensor in load_file(file).items() if one != key}, file, {"format": "pt"})
    shutil.copytree(folder / "vit", folder / "cut")
    file = folder / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    shutil.copytree(folder / "vit", folder / "pickled")
    weights = load_file(folder / "pickled" / "model.safetensors")
    torch.save(weights, folder / "pickled" / "pytorch_model.bin")
    (folder / "pickled" / "model.safetensors").unlink()
    shutil.copytree(folder / "vit", folder / "grey")
    ViTModel(ViTConfig(num_channels=1, **WIDE)).save_pretrained(folder / "grey")
    shutil.copytree(folder / "resnet", folder / "flipped")
    (folder / "flipped" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "MobileViTImageProcessor", "do_flip_channel_order": True})
    )
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["nowhere/at/all"],
            "`model_name_or_path`: expected the folder or Hub id of a vision model, got 'nowhere/at/all', which does",
        ),
        (
            ["bert"],
            "`model_name_or_path`: expected a vision encoder, got 'bert' of type 'bert', which takes `input_ids`",
        ),
        (["no-norm"], "expected weights for the whole encoder in 'no-norm', found none for layernorm.weight"),
        (["no-blocks"], "expected weights for the whole encoder in 'no-blocks', found none for embeddings.cls_token"),
        (
            ["cut"],
            "`model_name_or_path`: expected the folder or Hub id of a vision model in safetensors form, got 'cut'",
        ),
        (["pickled"], "`model_name_or_path`: expected the folder or Hub id of a vision model in safetensors form"),
        (["grey"], "3 channel(s) where 1 are wanted; train with --model.num_channels 3"),
        (["flipped"], "`model_name_or_path`: expected an image processor that takes a mean from RGB"),
        (["vit", "--model.hidden_size", "32"], "`model.hidden_size`: expected none beside `model_name_or_path`"),
        (["vit", "--model.model_type", "resnet"], "`model.model_type`: expected 'vit' as in `model_name_or_path`"),
        (["vit", "--model.tile_size", "2"], "`model.tile_size`: unknown key"),
        (["dinov2", "--views.image_size", "[48, 64]"], "`views.image_size`: expected a size that an encoder of type"),
        (["swin", "--sparse"], "`sparse`: expected a `model_name_or_path` of type vit, dinov2,"),
        (["resnet", "--sparse"], "got 'resnet'; leave it out"),
        (["run", "--sparse"], "got 'bigbird_vit'; leave it out, and add --model.attention_type block_sparse"),
        (["no-norm", "--sparse"], "expected tensor 'layernorm.weight' (32,) by its configuration, got none"),
        (["vit", "--freeze_layers", "3"], "`freeze_layers`: expected at most 2, the layers of this vit, got 3"),
        (["vit", "--layer_decay", "0"], "`layer_decay`: expected a factor above 0 and at most 1, got 0.0"),
        (["vit", "--expander_warmup_ratio", "1"], "`expander_warmup_ratio`: expected a share of the steps below 1"),
        (["", "--freeze_layers", "1"], "`freeze_layers`: expected a `model_name_or_path` beside it, got none"),
        (["", "--expander_warmup_ratio", "0.1"], "`expander_warmup_ratio`: expected a `model_name_or_path` beside it"),
        (["", "--sparse"], "`sparse`: expected a `model_name_or_path` beside it, got none"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_input_gets_one_line_and_nothing_is_written(folders, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    out = tmp_path / "run"
    source = ["--model_name_or_path", flags[0]] if flags[0] else []
    arguments = ["digits", "--output_dir", str(out), "--batch_size", "32", "--max_steps", "1", *source, *flags[1:]]
    assert main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not out.exists()


def test_a_resumed_run_keeps_its_source(tmp_path, settings, image_folder):
    save_source("vit", tmp_path / "one")
    save_source("dinov2", tmp_path / "two")
    data = image_folder(32)
    pretrain(out=tmp_path / "run", data=data, model_name_or_path=str(tmp_path / "one"), **settings)
    again = {"out": tmp_path / "run", "data": data, "resume_from_checkpoint": "latest"} | settings
    with pytest.raises(InputError, match=r"of another configuration: .*`model_name_or_path` is '.*two', the check"):
        pretrain(model_name_or_path=str(tmp_path / "two"), **again)
    shutil.rmtree(tmp_path / "one")
    assert pretrain(**again).results["steps"] == 2  # its recipe names the source
    stored = {"config": tmp_path / "run" / "recipe.yaml", "resume_from_checkpoint": "latest"}
    assert pretrain(out=tmp_path / "run", data=data, **stored).results["steps"] == 2


@pytest.mark.parametrize("name", ["vit", "dinov2", "registers", "dinov3"])
def test_a_source_becomes_sparse(name, tmp_path, settings, image_folder, before_step_1):
    source = save_source(name, tmp_path / "source")
    data = image_folder(32)
    settings |= {"model_name_or_path": str(tmp_path / "source"), "sparse": True}
    dense = {"model": {"attention_type": "original_full"}}
    begun = before_step_1(out=tmp_path / "dense", data=data, **settings, **dense)
    pixel_values = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(
        features(begun.model.encoder, pixel_values), features(source, pixel_values), atol=1e-5, rtol=1e-5
    )
    sparse = {"model": {"tile_size": 1, "num_random_blocks": 1, "image_size": 48}}
    result = pretrain(out=tmp_path / "sparse", data=data, **settings, **sparse)
    assert result.results["attention_density"] < 0.7
    model = AutoModel.from_pretrained(tmp_path / "sparse")
    assert type(model) is BigBirdViTModel
    assert (model.config.attention_type, model.config.tile_size, model.config.image_size) == ("block_sparse", 1, 48)
    found, expected = (features(one, pixel_values) for one in (model, result.encoder))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["run", "dinov3", "resnet"])
def test_frozen_layers_stay_and_the_others_learn(name, tmp_path, settings, image_folder, before_step_1):
    save_source(name, tmp_path / "source")
    data, settings = image_folder(32), settings | {"model_name_or_path": str(tmp_path / "source"), "layer_decay": 0.5}
    settings |= {"freeze_layers": 1, "views": {"image_size": 32}, "num_train_epochs": 2, "checkpointing_steps": 2}
    begun = before_step_1(out=tmp_path / "begun", data=data, **settings)
    before = {key: one.clone() for key, one in begun.model.encoder.state_dict().items()}
    begun.loop.step.train_mode()
    layers = begun.model.encoder.get_submodule(
        {"run": "encoder.layer", "dinov3": "model.layer", "resnet": "encoder.stages"}[name]
    )
    assert [one.training for one in layers] == [False, True]
    whole = pretrain(out=tmp_path / "whole", data=data, **settings)
    first = {"run": ("embeddings.", "encoder.layer.0."), "dinov3": ("embeddings.", "model.layer.0.")}
    frozen = first.get(name, ("embedder.", "encoder.stages.0."))
    unseen = {name.removeprefix("encoder.") for name in unseen_parameters(begun.model)}
    for key, tensor in whole.encoder.state_dict().items():
        if not key.endswith("num_batches_tracked") and key not in unseen:
            assert torch.equal(tensor, before[key]) == key.startswith(frozen), key
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step_00000004")
    again = pretrain(out=tmp_path / "again", data=data, resume_from_checkpoint="latest", **settings)
    for key, tensor in whole.encoder.state_dict().items():
        assert torch.equal(again.encoder.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", ["run", "resnet"])
@pytest.mark.parametrize("stopped_at", [1, 3], ids=["while-held", "after"])
def test_the_expander_warms_up_alone(name, stopped_at, tmp_path, settings, image_folder, before_step_1):
    save_source(name, tmp_path / "source")
    data, settings = image_folder(32), settings | {"model_name_or_path": str(tmp_path / "source")}
    settings |= {"expander_warmup_ratio": 0.5, "views": {"image_size": 32}, "num_train_epochs": 2}
    settings |= {"checkpointing_steps": 1, "checkpoints_total_limit": 9}
    begun = before_step_1(out=tmp_path / "begun", data=data, **settings)
    whole = pretrain(out=tmp_path / "whole", data=data, **settings)
    kept = tmp_path / "whole" / "checkpoints"
    states = [load_file(kept / f"step_0000000{step}" / "model.safetensors") for step in (1, 2, 3)]
    held = {key: one for key, one in begun.model.state_dict().items() if key.startswith("encoder.")}
    for state in states[:2]:  # statistics of batch norms as well
        assert all(torch.equal(state[key], one) for key, one in held.items())
    assert not torch.equal(states[0]["expander.output.weight"], begun.model.expander.output.weight)
    learnt = {key for key, one in held.items() if not torch.equal(states[2][key], one)}
    assert len(learnt) > 0.7 * len(held)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["grad_norm"] > 0 for line in lines] == [False, False, True, True]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for step in range(stopped_at + 1, 5):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / f"step_0000000{step}")
    again = pretrain(out=tmp_path / "again", data=data, resume_from_checkpoint="latest", **settings)
    for key, tensor in whole.encoder.state_dict().items():
        assert torch.equal(again.encoder.state_dict()[key], tensor), key
