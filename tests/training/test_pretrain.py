"""A run in this process: what it leaves, what it refuses."""

import json
import logging
import shutil
from io import BytesIO

import datasets
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining

from hf_vicreg import BigBirdViTConfig, pretrain
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.online_probe import small_pixels
from hf_vicreg.training.pretrain import main


@pytest.fixture
def recipe_file(tmp_path, tiny_recipe):
    """Returns a function that writes the tiny recipe, changed, and returns its path."""

    def write(**changes):
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(tiny_recipe | changes))
        return str(path)

    return write


@pytest.mark.slow  # image_text/ trains two branches in the default run
def test_two_branches_of_different_kinds_train_and_resume(tmp_path, tiny_recipe):
    resnet = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    settings = tiny_recipe | {
        "model": resnet,
        "second_model": tiny_recipe["model"],
        "vicreg": {"expander_sizes": [32, 32], "variance_weight": [25.0, 20.0]},
        "knn_every_epochs": 1,
        "knn_train_samples": 200,
        "knn_test_samples": 50,
        "num_train_epochs": 2,
    }
    out = tmp_path / "run"
    result = pretrain(out=out, data="digits", max_train_samples=96, **settings)
    names = {"raw_pixels", "untrained", "trained", "second_untrained", "second_trained"}
    assert set(result.results["knn_accuracy"]) == names
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    (measured,) = (line for line in lines if "knn_accuracy" in line)
    assert measured["second_knn_accuracy"] > 0
    first, second = AutoModel.from_pretrained(out), AutoModel.from_pretrained(out / "second_encoder")
    assert (first.config.model_type, second.config.model_type) == ("resnet", "bigbird_vit")
    images = [Image.new("RGB", (40, 30), (10 * index, 5, 200)) for index in range(3)]
    pixels = AutoImageProcessor.from_pretrained(out / "second_encoder")(images, return_tensors="pt")
    wrapper = AutoModelForPreTraining.from_pretrained(out, subfolder="pretraining")
    assert torch.equal(wrapper.second_encoder(**pixels).pooler_output, second(**pixels).pooler_output)
    # the stored recipe is the run's own: it resumes, and has nothing left to do
    again = pretrain(out=out, data="digits", config=out / "recipe.yaml", resume_from_checkpoint="latest")
    assert again.results["steps"] == 6
    with pytest.raises(InputError, match=r"`second_model.model_type`: expected a model type"):
        pretrain(out=tmp_path / "other", data="digits", **settings | {"second_model": {"model_type": "nothing"}})
    bert = {"model_type": "bert", "num_hidden_layers": 1, "hidden_size": 24, "vocab_size": 50}
    with pytest.raises(InputError, match=r"`second_model.model_type`: expected an encoder of images, got 'bert'"):
        pretrain(out=tmp_path / "other", data="digits", **settings | {"second_model": bert})


@pytest.mark.pictures
def test_a_run_leaves_a_folder_that_loads(tmp_path, tiny_recipe, caplog, capsys):
    out = tmp_path / "run"
    with caplog.at_level(logging.INFO, logger="hf_vicreg"):
        result = pretrain(
            out=out,
            data="digits",
            max_train_samples=96,
            **tiny_recipe | {"knn_every_epochs": 1, "num_train_epochs": 2},
        )
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "checkpoints",
        "config.json",
        "curves.png",
        "log.jsonl",
        "model.safetensors",
        "preprocessor_config.json",
        "pretraining",
        "recipe.yaml",
        "results.json",
    }
    # scripts take it for the sign that a run is finished: it comes last
    assert (out / "results.json").stat().st_mtime_ns == max(path.stat().st_mtime_ns for path in out.glob("*.*"))
    results = json.loads((out / "results.json").read_text())
    assert results == result.results
    assert results["steps"] == 6
    assert set(results["knn_accuracy"]) == {"raw_pixels", "untrained", "trained"}
    assert all(0 < value < 1 for value in results["knn_accuracy"].values())
    assert f"attention density {results['attention_density']:.3f}" in caplog.text
    assert "threads each" in caplog.text

    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in lines if "knn_accuracy" in line] == [1]
    parts = lines[0]
    weighted = 25 * parts["invariance"] + 25 * parts["variance"] + parts["covariance"]
    assert parts["loss"] == pytest.approx(weighted, rel=1e-5)
    assert parts["images_per_second"] > 0

    processor, model = AutoImageProcessor.from_pretrained(out), AutoModel.from_pretrained(out)
    images = [Image.new("RGB", (40, 30), (10 * index, 5, 200)) for index in range(3)]
    pixels = processor(images, return_tensors="pt")
    assert torch.equal(pixels["pixel_values"], result.processor(images, return_tensors="pt")["pixel_values"])
    assert torch.equal(model(**pixels).pooler_output, result.encoder(**pixels).pooler_output)
    wrapper = AutoModelForPreTraining.from_pretrained(out, subfolder="pretraining")
    assert torch.equal(wrapper.encoder(**pixels).pooler_output, model(**pixels).pooler_output)

    card = (out / "README.md").read_text()
    assert f"| {results['knn_accuracy']['trained']:.3f} |" in card
    assert "$" not in card
    printed = capsys.readouterr().out
    assert "raw pixels" in printed
    assert "AutoModel.from_pretrained" in printed
    # the same run again touches nothing
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="--resume_from_checkpoint latest to continue it"):
        pretrain(out=out, data="digits", **tiny_recipe)
    assert (out / "model.safetensors").read_bytes() == before


def test_unlabelled_folder_with_corrupt_images(tmp_path, tiny_recipe, image_folder, caplog):
    folder = image_folder(64)
    for index in (3, 17):
        (folder / f"{index:04d}.png").write_bytes(b"broken")
    result = pretrain(
        out=tmp_path / "run", data=folder, model=BigBirdViTConfig(**tiny_recipe.pop("model")), **tiny_recipe
    )
    assert result.results["unusable_images"] == 2
    assert "2 image(s) were not usable and replaced by others" in caplog.text
    assert "0003.png: not an image; 0017.png: not an image" in caplog.text
    assert result.results["knn_accuracy"] == {}
    assert str(tmp_path) not in (tmp_path / "run" / "README.md").read_text()  # no paths of this machine
    assert "not measured" in (tmp_path / "run" / "README.md").read_text()


def test_another_encoder_is_trained_and_loads(tmp_path, tiny_recipe, image_folder):
    resnet = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    settings = tiny_recipe | {"model": resnet | {"layer_type": "basic"}}
    result = pretrain(out=tmp_path / "run", data=image_folder(32), **settings)
    assert result.results["features"] == 16
    assert "A `resnet` encoder" in (tmp_path / "run" / "README.md").read_text()
    processor, model = (
        AutoImageProcessor.from_pretrained(tmp_path / "run"),
        AutoModel.from_pretrained(tmp_path / "run"),
    )
    pixels = processor([Image.new("RGB", (50, 40), (9, 80, 200))], return_tensors="pt")
    assert pixels["pixel_values"].shape[-2:] == (224, 224)  # for its configuration names no size
    assert torch.equal(model(**pixels).pooler_output, result.encoder(**pixels).pooler_output)


def test_multi_crop_trains_and_resumes(tmp_path, tiny_recipe, image_folder):
    settings = tiny_recipe | {"views": {"num_local_views": 3, "local_image_size": 16}, "checkpointing_steps": 2}
    data = image_folder(64)
    whole = pretrain(out=tmp_path / "whole", data=data, **settings | {"num_train_epochs": 2})
    assert whole.results["steps"] == 4
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    plain = pretrain(out=tmp_path / "plain", data=data, **settings | {"views": {}})
    first = json.loads((plain.output_dir / "log.jsonl").read_text().splitlines()[0])["loss"]
    assert losses[0] != first
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step_00000004")
    again = pretrain(
        out=tmp_path / "again", data=data, resume_from_checkpoint="latest", **settings | {"num_train_epochs": 2}
    )
    for name, tensor in whole.encoder.state_dict().items():
        assert torch.equal(again.encoder.state_dict()[name], tensor)
    stored = yaml.safe_load((tmp_path / "again" / "recipe.yaml").read_text())
    assert stored["resume_from_checkpoint"] is None, "the recipe begins anew in another folder"


@pytest.mark.parametrize("positions", ["rope", "absolute"])
def test_a_finished_run_is_used_with_larger_images(tmp_path, tiny_recipe, image_folder, positions):
    tiny_recipe["model"]["position_embedding_type"] = positions
    settings = {"out": tmp_path / "run", "data": image_folder(64), **tiny_recipe}
    whole = pretrain(**settings)
    if positions == "rope":  # its recipe has the size of its views, which stay as they are
        (tmp_path / "recipe.yaml").write_text((tmp_path / "run" / "recipe.yaml").read_text())
        again = {"config": tmp_path / "recipe.yaml", "model": {"image_size": 40}, "resume_from_checkpoint": "latest"}
        pretrain(out=tmp_path / "run", data=settings["data"], **again)
        assert AutoModel.from_pretrained(tmp_path / "run").config.image_size == 40
        again = {"model": tiny_recipe["model"] | {"image_size": 44}, "resume_from_checkpoint": "latest"}
        pretrain(**settings | again)
        assert AutoModel.from_pretrained(tmp_path / "run").config.image_size == 44
        again = {"model": {key: one for key, one in tiny_recipe["model"].items() if key != "image_size"}}
        pretrain(**settings | again | {"views": {"image_size": 32}, "resume_from_checkpoint": "latest"})
        assert AutoModel.from_pretrained(tmp_path / "run").config.image_size == 44
        # in a folder without a run, to resume is to begin: one flag sets both sizes
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe | {"views": {"image_size": 24}}))
        again = {"config": tmp_path / "recipe.yaml", "model": {"image_size": 40}, "resume_from_checkpoint": "latest"}
        pretrain(out=tmp_path / "new", data=settings["data"], **again)
        stored = yaml.safe_load((tmp_path / "new" / "recipe.yaml").read_text())
        assert (stored["views"]["image_size"], stored["model"]["image_size"]) == (None, 40)
    larger = {"model": tiny_recipe["model"] | {"image_size": 48}, "views": {"image_size": 32}}
    settings |= larger | {"resume_from_checkpoint": "latest"}
    if positions == "absolute":  # the table of positions is a weight, and of another shape
        with pytest.raises(
            InputError, match=r"another configuration: `model.image_size` is 48, the checkpoint has 32;"
        ):
            pretrain(**settings)
        return
    pretrain(**settings)
    encoder = AutoModel.from_pretrained(tmp_path / "run")
    assert encoder.config.image_size == 48
    size = AutoImageProcessor.from_pretrained(tmp_path / "run").size
    assert (size["height"], size["width"]) == (48, 48)
    for name, tensor in whole.encoder.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor)
    with pytest.raises(InputError, match=r"configuration: `views.image_size` is 24, the checkpoint has 32;"):
        pretrain(**settings | {"views": {"image_size": 24}})


def test_what_was_measured_at_another_size_is_not_kept(tmp_path, tiny_recipe):
    settings = tiny_recipe | {"knn_train_samples": 200, "knn_test_samples": 50, "knn_every_epochs": 1}
    settings |= {"out": tmp_path / "run", "data": "digits", "max_train_samples": 96}
    first = pretrain(**settings).results["knn_accuracy"]
    assert set(first) == {"raw_pixels", "untrained", "trained"}
    assert pretrain(**settings, resume_from_checkpoint="latest").results["knn_accuracy"] == first
    settings["model"] = settings["model"] | {"image_size": 16}
    again = pretrain(**settings | {"views": {"image_size": 32}}, resume_from_checkpoint="latest")
    assert set(again.results["knn_accuracy"]) == {"raw_pixels", "trained"}
    assert again.results["knn_accuracy"] != {key: first[key] for key in ("raw_pixels", "trained")}
    assert "| untrained encoder | not measured |" in (tmp_path / "run" / "README.md").read_text()


def test_larger_statistics_in_two_passes_are_the_larger_batch(tmp_path, tiny_recipe, image_folder):
    data = image_folder(64)
    settings = tiny_recipe | {"num_train_epochs": 3, "model": tiny_recipe["model"] | {"drop_path_rate": 0.0}}
    whole = pretrain(out=tmp_path / "whole", data=data, **settings)
    pieces = pretrain(out=tmp_path / "pieces", data=data, **settings | {"batch_size": 8, "statistics_batch_size": 32})
    assert pieces.results["steps"] == whole.results["steps"] == 6
    losses = [
        [json.loads(line)["loss"] for line in (run.output_dir / "log.jsonl").read_text().splitlines()]
        for run in (whole, pieces)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    small = pretrain(out=tmp_path / "small", data=data, **settings | {"batch_size": 8})
    assert small.results["steps"] == 24


def test_encoder_of_text_is_refused(tmp_path, tiny_recipe, image_folder):
    settings = tiny_recipe | {"model": {"model_type": "bert", "num_hidden_layers": 1}}
    with pytest.raises(InputError, match=r"`model.model_type`: expected an encoder of images, got 'bert'"):
        pretrain(out=tmp_path / "run", data=image_folder(32), **settings)
    assert not (tmp_path / "run").exists()


def test_images_per_process_are_stored_as_the_batch(tmp_path, tiny_recipe, image_folder):
    pretrain(out=tmp_path / "run", data=image_folder(32), per_device_train_batch_size=16, **tiny_recipe)
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert (recipe["batch_size"], recipe["per_device_train_batch_size"]) == (16, None)


def test_pixels_of_large_images_are_compared_small():
    assert small_pixels(torch.rand(2, 3, 32, 32)).shape == (2, 3 * 32 * 32)
    assert small_pixels(torch.rand(2, 3, 224, 100)).shape == (2, 3 * 32 * 32)


@pytest.mark.parametrize("broken", ["train_split", "test_split"])
def test_split_without_a_readable_image_is_named(broken, tmp_path, tiny_recipe):
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    folder = tmp_path / "set"
    folder.mkdir()
    buffer = BytesIO()
    Image.new("RGB", (32, 32), (9, 9, 200)).save(buffer, "PNG")
    for split in ("train", "test"):
        contents = [buffer.getvalue()] * 32
        if broken == f"{split}_split":
            count = 8 if split == "train" else 32  # of the training images only those that the accuracy looks at
            contents[:count] = [b"broken"] * count
        rows = {"image": [{"bytes": content, "path": None} for content in contents], "label": [0] * 32}
        table = datasets.Dataset.from_dict(rows, features=features).cast_column("image", datasets.Image())
        table.to_parquet(folder / f"{split}.parquet")
    with pytest.raises(InputError, match=f"`{broken}`: expected usable images"):
        pretrain(out=tmp_path / "run", data=folder, **tiny_recipe | {"knn_train_samples": 8})


def test_resuming_a_finished_run_changes_nothing(tmp_path, tiny_recipe, image_folder):
    folder = image_folder(64)
    first = pretrain(out=tmp_path / "run", data=folder, **tiny_recipe)
    again = pretrain(out=tmp_path / "run", data=folder, resume_from_checkpoint="latest", **tiny_recipe)
    for one, other in zip(first.encoder.parameters(), again.encoder.parameters(), strict=True):
        assert torch.equal(one, other)


def test_resuming_never_overwrites_what_it_cannot_continue(tmp_path, tiny_recipe, image_folder):
    folder, out = image_folder(64), tmp_path / "run"
    pretrain(out=out, data=folder, **tiny_recipe)
    weights = (out / "model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(InputError, match="holds an encoder but no checkpoint"):
        pretrain(out=out, data=folder, resume_from_checkpoint="latest", **tiny_recipe | {"seed": 3})
    assert (out / "model.safetensors").read_bytes() == weights
    foreign = tmp_path / "foreign"
    (foreign / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="holds something else"):
        pretrain(out=foreign, data=folder, resume_from_checkpoint="latest", **tiny_recipe)


def test_restart_without_a_checkpoint_starts_the_log_anew(tmp_path, tiny_recipe, image_folder):
    folder, out = image_folder(64), tmp_path / "run"
    pretrain(out=out, data=folder, **tiny_recipe)
    shutil.rmtree(out / "checkpoints")
    (out / "model.safetensors").unlink()  # as if killed before the first checkpoint, in the middle of a line
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "ep')
    pretrain(out=out, data=folder, resume_from_checkpoint="latest", **tiny_recipe)
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [1, 2]


def test_checkpoint_of_another_configuration_is_refused(tmp_path, tiny_recipe, image_folder, recipe_file, capsys):
    folder, out = image_folder(64), tmp_path / "run"
    pretrain(out=out, data=folder, **tiny_recipe)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    arguments = ["--config", recipe_file(), "--train_dir", str(folder), "--output_dir", str(out)]
    arguments += ["--resume_from_checkpoint", "latest"]
    for change, named in (
        (["--learning_rate", "0.5"], "`learning_rate` is 0.5"),
        (["--model.tile_size", "2"], "`model.tile_size` is 2, the checkpoint has 1"),
    ):
        capsys.readouterr()
        assert main([*arguments, *change]) == 2
        assert named in capsys.readouterr().err
    (folder / "0000.png").unlink()
    assert main(arguments) == 2
    assert "the images are not the ones" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_non_finite_steps_are_skipped_and_the_run_stops_with_advice(tmp_path, tiny_recipe, image_folder):
    settings = tiny_recipe | {"learning_rate": 1e30, "num_train_epochs": 40}
    with pytest.raises(InputError, match="`learning_rate`: loss or gradient was not finite"):
        pretrain(out=tmp_path / "run", data=image_folder(64), **settings)


def test_a_run_stops_after_as_many_skipped_steps_as_it_was_told(tmp_path, tiny_recipe, image_folder):
    settings = tiny_recipe | {"learning_rate": 1e30, "num_train_epochs": 40, "max_skipped_steps": 2}
    with pytest.raises(InputError, match="not finite for 2 steps in a row"):
        pretrain(out=tmp_path / "run", data=image_folder(64), **settings)


def test_recomputed_layers_give_the_same_weights(tmp_path, tiny_recipe, image_folder):
    folder = image_folder(64)
    plain, less_memory = (
        pretrain(out=tmp_path / str(switch), data=folder, gradient_checkpointing=switch, **tiny_recipe)
        for switch in (False, True)
    )
    assert any(getattr(one, "gradient_checkpointing", False) for one in less_memory.encoder.modules())
    for one, two in zip(plain.encoder.parameters(), less_memory.encoder.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.slow  # a minute or more for the C++ compiler
def test_the_compiled_encoder_trains_like_the_other(tmp_path, tiny_recipe, image_folder):
    folder, settings = image_folder(64), tiny_recipe | {"model": tiny_recipe["model"] | {"num_hidden_layers": 1}}
    plain, compiled = (
        pretrain(out=tmp_path / str(switch), data=folder, torch_compile=switch, max_steps=2, **settings)
        for switch in (False, True)
    )
    assert compiled.encoder._compiled_call_impl is not None
    assert (tmp_path / "True" / "model.safetensors").stat().st_size > 0
    for one, two in zip(plain.encoder.parameters(), compiled.encoder.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-4)
    AutoModel.from_pretrained(tmp_path / "True")  # names are those of an encoder that is not compiled


def test_lars_is_what_a_run_is_told_to_use(tmp_path, tiny_recipe, image_folder):
    settings = tiny_recipe | {"optim": "lars", "learning_rate": 0.3, "min_learning_rate": 0.002}
    result = pretrain(out=tmp_path / "run", data=image_folder(64), **settings)
    assert result.results["skipped_steps"] == 0
    state = load_file(tmp_path / "run" / "checkpoints" / "step_00000002" / "optimizer.safetensors")
    assert {key.split(".", 1)[1] for key in state} == {"momentum_buffer"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_dir", "{empty}"], "`train_dir`"),
        (["--train_dir", "{missing}"], "`train_dir`"),
        (["--dataset_name", "{images}/nothing"], "`dataset_name`"),
        (["--train_dir", "{images}", "--batch_size", "1"], "at least 2 images for a covariance"),
        (["--train_dir", "{images}", "--per_device_train_batch_size", "1"], "at least 2 images"),
        (["--train_dir", "{images}", "--batch_size", "65"], "`batch_size`: expected at most the 64 images"),
        (["--train_dir", "{images}", "--model.image_size", "4"], "at least one patch"),
        (
            ["--train_dir", "{images}", "--views.image_size", "4", "--model.image_size", "32"],
            "`views.image_size`: expected at least one patch of (8, 8), got 4;",
        ),
        (
            ["--train_dir", "{images}", "--statistics_batch_size", "80"],
            "`statistics_batch_size`: expected a multiple of the batch size 32, got 80",
        ),
        (
            ["--train_dir", "{images}", "--statistics_batch_size", "96"],
            "`statistics_batch_size`: expected at most the 64 images",
        ),
        (
            ["--train_dir", "{images}", "--statistics_batch_size", "64", "--second_model.model_type", "resnet"],
            "`statistics_batch_size`: expected an encoder without batch norms, which would see a part of the images, "
            "got 'resnet'",
        ),
        (
            ["--train_dir", "{images}", "--views.num_local_views", "2", "--views.local_image_size", "32"],
            "`views.local_image_size`: expected less than the image size (32, 32), got 32",
        ),
        (
            ["--train_dir", "{images}", "--views.num_local_views", "2", "--views.local_image_size", "7"],
            "`views.local_image_size`: the encoder 'bigbird_vit' takes no images of 7 pixels",
        ),
        (
            ["--train_dir", "{images}", "--views.num_local_views", "2", "--second_model.model_type", "vit"],
            "`views.num_local_views`: expected 0 with a second encoder",
        ),
        (
            ["--train_dir", "{images}", "--views.num_local_views", "2", "--vicreg.variance_weight", "[25, 10]"],
            "`vicreg.variance_weight`: expected one number beside local views, got [25, 10]",
        ),
        (
            ["--train_dir", "{images}", "--views.local_crop_max_ratio", "0", "--views.local_crop_min_ratio", "0"],
            "`views.local_crop_max_ratio`: expected a number above 0",
        ),
        (["--train_dir", "{images}", "--model.no_such_key", "4"], "unknown key"),
        (
            ["--train_dir", "{corrupt}"],
            "readable images in corrupt, found 1 of 1 corrupt, one.jpg among them",
        ),
        (["--train_dir", "{small}"], "at least one patch (8, 8) (height, width) in pixels, found (8, 7) in dot.png"),
        (["--train_dir", "{images}", "--output_dir", "{images}"], "`output_dir`: expected a new or empty folder"),
        (["--train_dir", "{images}", "--resume_from_checkpoint", "step_7"], "`resume_from_checkpoint`"),
        (["--train_dir", "{images}", "--mixed_precision", "fp16"], "expected a GPU for 'fp16', found none"),
        (["--train_dir", "{images}", "--no_such_flag", "1"], "`--no_such_flag`: unknown flag"),
        (["--train_dir", "{images}", "--with_tracking", "--report_to", "paper"], "`report_to`: expected one of"),
    ],
    ids=lambda value: "-".join(value).replace("--", "") if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(flags, message, tmp_path, image_folder, recipe_file, capsys):
    folders = {"images": image_folder(64), "empty": tmp_path / "empty", "missing": tmp_path / "missing"}
    folders["empty"].mkdir()
    folders["corrupt"] = tmp_path / "corrupt"
    folders["corrupt"].mkdir()
    (folders["corrupt"] / "one.jpg").write_bytes(b"not a picture")
    folders["small"] = tmp_path / "small"
    folders["small"].mkdir()
    Image.new("RGB", (7, 8)).save(folders["small"] / "dot.png")
    before = sorted(tmp_path.rglob("*"))
    arguments = ["--config", recipe_file(), "--output_dir", str(tmp_path / "run")]
    code = main(arguments + [flag.format(**folders) for flag in flags])
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in error
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "tiny.yaml") == before


def test_another_precision_in_the_same_python_is_one_line(tiny_recipe, image_folder, tmp_path):
    settings = tiny_recipe | {"data": image_folder(16), "max_steps": 1, "batch_size": 8, "device": "cpu"}
    pretrain(out=tmp_path / "first", **settings)
    with pytest.raises(InputError, match=r"`mixed_precision`: expected 'no', which an earlier run.*got 'bf16'"):
        pretrain(out=tmp_path / "second", **settings, mixed_precision="bf16")
    assert not (tmp_path / "second").exists()
