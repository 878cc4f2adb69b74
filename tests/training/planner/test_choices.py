"""What is chosen from images, machine and time: sparse, within the images, and around what was given."""

import math
from dataclasses import replace

import pytest

from hf_vicreg import BigBirdViTConfig, BigBirdViTModel
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.planner.choices import (
    LADDER,
    MAX_DENSITY,
    MAX_EPOCHS,
    Images,
    choose,
    choose_schedule,
    density,
    is_open,
)
from hf_vicreg.training.planner.ladder import training_flops, used_side
from hf_vicreg.training.planner.machine import Machine
from hf_vicreg.training.planner.schedule import steps_within
from hf_vicreg.training.run.arguments import seconds_of

CPU = Machine("cpu", "2 CPU cores", 2, 24 * 2**30)
GPU = Machine("cuda", "a GPU", 8, 80 * 2**30)
FOLDERS = {
    "crops": Images(360, 250, 260, False),
    "cifar": Images(20_000, 32, 32, True),
    "photographs": Images(205, 480, 640, False),
    "few": Images(30, 300, 200, False),
    "tiny": Images(5_000, 12, 12, False),
    "many": Images(1_300_000, 375, 500, True),
}


def _views(made):
    size = made.settings["views"].get("image_size") or made.settings["model"]["image_size"]
    return (size, size)


def _density(made):
    return density(made.settings["model"] | {"image_size": _views(made)})


@pytest.mark.parametrize("seconds", [60, 900, 10_800, 10**6], ids=["1m", "15m", "3h", "11d"])
@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("name", FOLDERS)
def test_every_plan_is_sparse_and_builds(name, machine, seconds):
    images = FOLDERS[name]
    made = choose({}, images, machine, seconds)
    config = BigBirdViTConfig(**made.settings["model"])
    grid = config.grid_size(*_views(made))
    assert _density(made) <= MAX_DENSITY
    used, side = config.image_size_hw[0], _views(made)[0]
    shown = math.sqrt((1 + made.settings["views"]["crop_min_ratio"]) / 2)
    assert abs(used - side / shown) <= config.patch_stride_hw[0] / 2
    assert min(grid) >= 5  # fewer patches could not be sparse
    assert 2 <= made.settings["batch_size"] <= images.count
    assert min(config.patch_size_hw) <= max(8, min(images.height, images.width))
    assert made.settings["vicreg"]["expander_sizes"][-1] <= 8192


def test_density_is_that_of_the_encoder():
    made = choose({}, FOLDERS["cifar"], CPU, 900)
    encoder = BigBirdViTModel(BigBirdViTConfig(**made.settings["model"]))
    found = [pattern.density for pattern in encoder.attention_patterns(24, 24)]
    assert _density(made) == pytest.approx(sum(found) / len(found))


@pytest.mark.parametrize(
    ("images", "side", "patches"),
    [(Images(5_000, 28, 28, True), 24, 5), (Images(5_000, 70, 64, True), 48, 5), (Images(5_000, 70, 70, True), 64, 7)],
    ids=["28", "64", "70"],
)
def test_views_of_small_images_have_the_pixels_of_their_crops(images, side, patches):
    made = choose({}, images, CPU, 900)
    assert _views(made) == (side, side)
    assert BigBirdViTConfig(**made.settings["model"]).grid_size(side, side) == (patches, patches)


def test_more_time_a_larger_encoder_and_never_a_smaller_one():
    rungs = [choose({}, FOLDERS["many"], GPU, seconds).rung for seconds in (60, 3600, 10**5, 10**7)]
    assert rungs == sorted(rungs)
    assert rungs[0] == 0
    assert rungs[-1] == len(LADDER) - 1
    assert choose({}, FOLDERS["few"], GPU, 10**7).rung == 0, "a thousand passes over 30 images are no food for a ViT"


def test_flops_of_the_ladder_by_hand():
    # 49 patches and CLS, 3 layers of 4 x 128^2 + 2 x 128 x 384 products, expander 128-2048-2048-2048; 2 views, and
    # 2 operations a product, forward once and backward twice
    by_hand = 50 * 3 * (4 * 128**2 + 2 * 128 * 384) + 128 * 2048 + 2 * 2048**2
    assert training_flops(LADDER[0]) == 12 * by_hand


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"model": {"hidden_size": 96, "num_attention_heads": 2}}, {"hidden_size": 96, "num_attention_heads": 2}),
        ({"model": {"hidden_size": 256}}, {"num_attention_heads": 8, "intermediate_size": 768}),
        (
            {"model": {"hidden_size": 100, "intermediate_size": 10}},
            {"num_attention_heads": 5, "intermediate_size": 10},
        ),
        ({"model": {"image_size": 64}}, {"image_size": 64, "patch_size": 16, "patch_stride": 8}),
        ({"model": {"patch_size": 4}}, {"image_size": 40, "patch_size": 4}),
        ({"views": {"num_local_views": 2, "local_image_size": 24}}, {"image_size": 40, "patch_size": 8}),
        ({"model": {"tile_size": 1}}, {"tile_size": 1}),
        ({"views": {"image_size": 48}}, {"image_size": 48, "patch_size": 12, "patch_stride": 6}),
    ],
    ids=["width and heads", "width", "width and MLP", "image", "patch", "local views", "tile", "views"],
)
def test_the_rest_adapts_to_what_is_given(given, found):
    made = choose(given, FOLDERS["cifar"], CPU, 900)
    model = made.settings["model"]
    assert {key: model.get(key) for key in found} == found
    assert _density(made) <= MAX_DENSITY
    BigBirdViTConfig(**model)


@pytest.mark.parametrize("width", [256, 512, 768, 1024])
@pytest.mark.parametrize("machine", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("seconds", [60, 10_800, 10**6])
def test_a_width_alone_is_no_business_of_the_machine_or_the_time(width, machine, seconds):
    """Heads and MLP of another rung's width do not fit it."""
    model = choose({"model": {"hidden_size": width}}, FOLDERS["many"], machine, seconds).settings["model"]
    assert model["intermediate_size"] in (3 * width, 4 * width)
    assert width / model["num_attention_heads"] in (32, 64)
    BigBirdViTConfig(**model)


@pytest.mark.parametrize(("whole", "processes", "batch"), [(64, 1, 64), (300, 1, 150), (300, 4, 100), (1024, 2, 256)])
def test_the_batch_adapts_to_that_of_the_loss(whole, processes, batch):
    machine = replace(CPU, num_processes=processes)
    assert choose({"statistics_batch_size": whole}, FOLDERS["cifar"], machine, 900).settings["batch_size"] == batch


@pytest.mark.parametrize("name", FOLDERS)
def test_sixteen_cores_are_as_good_as_one_process_or_as_sixteen(name):
    one = choose({}, FOLDERS[name], Machine("cpu", "", 16, 24 * 2**30), 10_800).settings
    sixteen = choose({}, FOLDERS[name], Machine("cpu", "", 1, 24 * 2**30, 16), 10_800).settings
    assert one["views"] == sixteen["views"]
    assert one["model"] == sixteen["model"]


@pytest.mark.parametrize(("crop", "used"), [(1.0, 24), (0.6, 28), (0.2, 32), (0.02, 32)])
def test_the_encoder_is_used_with_images_as_large_as_crops_made_them_look(crop, used):
    made = choose({"views": {"crop_min_ratio": crop}}, FOLDERS["cifar"], CPU, 900)
    assert (made.settings["views"]["image_size"], made.settings["model"]["image_size"]) == (24, used)


@pytest.mark.parametrize(("count", "crop", "used"), [(10_000, 0.08, 304), (1000, 0.2, 280)])
def test_many_large_images_have_the_papers_crops_and_their_size(count, crop, used):
    made = choose({}, Images(count=count, height=300, width=300, labelled=False), GPU, 10**6)
    assert made.settings["views"]["image_size"] == 224
    assert (made.settings["views"]["crop_min_ratio"], made.settings["model"]["image_size"]) == (crop, used)


@pytest.mark.parametrize(
    ("side", "crop", "stride", "used"),
    [(24, 0.2, 4, 32), (112, 0.8, 48, 112), (24, 0.2, [4, 6], 36), (24, 1.0, 8, 24)],
)
def test_the_size_of_use_is_whole_strides_and_not_below_the_views(side, crop, stride, used):
    assert used_side(side, crop, stride) == used


def test_two_encoders_have_one_size():
    made = choose({"second_model": {"model_type": "vit"}}, FOLDERS["cifar"], CPU, 900)
    assert made.settings["model"]["image_size"] == made.settings["views"]["image_size"] == 24


def test_batch_and_expander_follow_each_other():
    assert choose({}, FOLDERS["cifar"], CPU, 900).settings["batch_size"] == 256
    made = choose({"batch_size": 64}, FOLDERS["cifar"], CPU, 900)
    assert made.settings["vicreg"]["expander_sizes"] == [512] * 3
    assert made.settings["learning_rate"] == pytest.approx(1.5e-3)
    assert made.settings["expander_lr_scale"] == 128 / 512
    assert made.reasons["batch_size"] == "given"
    two = Machine("cpu", "", 1, 24 * 2**30, num_processes=3)
    assert choose({}, FOLDERS["photographs"], two, 900).settings["batch_size"] % 3 == 0
    by_device = choose({"per_device_train_batch_size": 10}, FOLDERS["cifar"], two, 900)
    assert by_device.settings["batch_size"] == 30


@pytest.mark.parametrize(
    "given",
    [{"learning_rate": 1e-3}, {"model": {"hidden_size": 192}}, {"objective": "simclr"}],
    ids=["rate", "width", "objective"],
)
def test_the_expanders_rate_is_lowered_where_that_was_measured(given):
    made = choose(given, FOLDERS["cifar"], CPU, 900)
    assert "expander_lr_scale" not in made.settings
    assert made.settings["learning_rate"] == 1e-3


def test_other_encoders_get_views_and_batch_alone():
    made = choose({"model": {"model_type": "resnet"}}, FOLDERS["cifar"], CPU, 900)
    assert made.settings["model"] == {"model_type": "resnet"}
    assert made.settings["views"]["image_size"] == 32
    assert made.settings["batch_size"] == 256


def test_too_few_images_are_refused():
    with pytest.raises(InputError, match=r"at least 16 usable images.*found 15"):
        choose({}, Images(15, 300, 300, False), CPU, 900)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"num_train_epochs": 3}, True),
        ({"num_train_epochs": 3, "batch_size": 8, "model": {"hidden_size": 8}}, False),
        ({"max_steps": 3, "statistics_batch_size": 8, "model": {"model_type": "resnet"}}, False),
        ({"max_steps": 3, "batch_size": 8, "model": {"hidden_size": 8}, "time_budget": "2m"}, True),
    ],
)
def test_what_is_open_is_planned(settings, expected):
    assert is_open(settings) is expected


@pytest.mark.parametrize(
    ("budget", "seconds", "steps", "least"),
    [(3.0, -17.0, 10, "40s"), (600.0, 500.0, 1000, "25m"), (3600.0, 3000.0, 30_000, "12h")],
    ids=["start-alone", "minutes", "hours"],
)
def test_too_short_a_time_is_told_with_one_that_is_enough(budget, seconds, steps, least):
    with pytest.raises(InputError, match=rf"the least is about --time_budget {least}[.,]"):
        steps_within(seconds, 1.0, steps, most_epochs=800, images=40, budget=budget)
    spent, enough = budget - seconds, seconds_of(least)
    assert steps_within(enough - spent, 1.0, steps, most_epochs=800, images=40, budget=enough) >= steps


def test_schedule_of_a_short_and_of_a_long_run():
    short = choose({}, FOLDERS["cifar"], CPU, 900)
    choose_schedule(short, 800, 78, 1.0, 10.0)
    assert short.settings["logging_steps"] == 10
    few = choose({}, FOLDERS["few"], CPU, 900)
    choose_schedule(few, 38, 2, 1.0, 0.0)
    assert few.settings["logging_steps"] == 1, "a run of 38 steps can be judged as well"
    settings = short.settings
    assert (settings["max_steps"], settings["num_train_epochs"]) == (800, 11)
    assert settings["vicreg"]["variance_weight"] == 10.0
    assert settings["checkpointing_steps"] == 60
    assert settings["knn_every_epochs"] * (78 * 1.0) * 0.08 * 5 >= 10.0
    given = choose({"num_train_epochs": 4, "checkpointing_steps": 7}, FOLDERS["cifar"], CPU, 900)
    choose_schedule(given, 312, 78, 1.0, 0.0)
    assert "max_steps" not in given.settings
    assert given.settings["checkpointing_steps"] == 7
    assert "knn_every_epochs" not in given.settings, "nothing to measure without labels"
    long = choose({}, FOLDERS["many"], GPU, 10**6)
    choose_schedule(long, 20_000, 5_000, 0.5, 0.0)
    assert long.settings["vicreg"]["variance_weight"] == 25.0


def test_passes_are_limited_by_what_a_small_set_can_teach():
    assert MAX_EPOCHS * FOLDERS["few"].count < LADDER[1].images_seen
