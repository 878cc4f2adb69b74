"""Runs that paint: a picture at each epoch's end, a model that fills holes, the loss of a step, what is refused."""

import copy

import pytest
import torch
from PIL import Image

from hf_vicreg import VicRegConfig, VicRegForPreTraining, pretrain
from hf_vicreg.cli import main
from hf_vicreg.modeling.image_patches import patchify
from hf_vicreg.modeling.masked_objectives import painter_of
from hf_vicreg.modeling.visible_patches import draw_masked_patches
from hf_vicreg.painting import load_painter
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.monitor import masked_pictures
from hf_vicreg.training.planner.choices import Images, choose
from hf_vicreg.training.planner.machine import Machine
from hf_vicreg.training.planner.memory import step_memory
from hf_vicreg.training.run.resolve import resolve

DECODER = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 24}
SETTINGS = {"mae": DECODER | {"mask_ratio": 0.5}, "simmim": {"mask_ratio": 0.5}}


def build(name, recipe, **settings):
    torch.manual_seed(0)
    config = VicRegConfig(
        encoder=recipe["model"], objective=name, objective_settings=SETTINGS[name] | settings, expander_sizes=[8]
    )
    return VicRegForPreTraining(config)


@pytest.fixture(scope="module")
def run(request, tmp_path_factory):
    """A run of two epochs, and how often it has drawn its picture."""
    conftest = request.config.pluginmanager.get_plugin(str(request.config.rootpath / "tests" / "conftest.py"))
    folder = tmp_path_factory.mktemp("masked")
    (folder / "images").mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(12):
        pixels = torch.randint(0, 256, (36, 30, 3), dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(pixels).save(folder / "images" / f"{index:04d}.png")
    settings = copy.deepcopy(conftest.TINY_RECIPE) | {"objective": "mae", "mae": SETTINGS["mae"], "batch_size": 6}
    settings |= {"num_train_epochs": 2, "knn_every_epochs": 1, "ema_decay": 0.9}
    pictures = []
    draw = masked_pictures.MaskedPictures.draw

    def counted(self):
        draw(self)
        pictures.append((self.path.read_bytes(), self.model.encoder.embeddings.cls_token.detach().clone()))

    masked_pictures.MaskedPictures.draw = counted
    threads = torch.get_num_threads()
    try:
        pretrain(out=folder / "run", data=folder / "images", **settings)
    finally:
        masked_pictures.MaskedPictures.draw = draw
        torch.set_num_threads(threads)
    return folder, pictures


def test_a_picture_is_drawn_at_each_epochs_end(run):
    folder, pictures = run
    assert len(pictures) == 2
    assert pictures[0][0] != pictures[1][0]  # the encoder has learned in between
    assert "](masked.png)" in (folder / "run" / "README.md").read_text()
    with Image.open(folder / "run" / "masked.png") as image:
        # three rows of 32x32 pixels, three times enlarged, with gaps of 4
        assert image.size == (8 * 96 + 7 * 4, 3 * 96 + 2 * 4)
        grid = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).view(296, 796, 3)
    original, masked, painted = (grid[top : top + 96, :96] for top in (0, 100, 200))
    hidden = draw_masked_patches((4, 4), (1, 1), 0.5, "picture/0").view(4, 4)
    hidden = hidden.repeat_interleave(24, 0).repeat_interleave(24, 1)
    assert torch.equal(masked[~hidden], original[~hidden])
    assert torch.equal(painted[~hidden], original[~hidden])
    assert (masked[hidden].float() - 127.5).abs().max() <= 1
    assert not torch.equal(painted[hidden], original[hidden])


def test_a_run_fills_holes(run, capsys, monkeypatch):
    folder, _ = run
    monkeypatch.chdir(folder)
    painter, processor = load_painter("run")
    wrapper = VicRegForPreTraining.from_pretrained("run/pretraining").eval()
    for name, weight in painter.encoder.state_dict().items():
        assert torch.equal(weight, wrapper.encoder.state_dict()[name])
    assert processor.size["height"] == 32
    assert main(["paint", "images/0000.png", "run", "--mask", "0,0,10,10", "--output", "out.png"]) == 0
    assert "patches painted" in capsys.readouterr().out


@pytest.mark.parametrize("name", SETTINGS)
def test_the_loss_is_that_of_the_model_that_paints(name, tiny_recipe):
    model = build(name, tiny_recipe).double().train()
    views = torch.randn(3, 2, 3, 32, 40, dtype=torch.float64)
    model.begin_step(7, 10)
    with torch.no_grad():
        for layer in model.encoder.encoder.layer:
            layer.drop_path.rate = 0
    outputs = model(views)
    painter = painter_of(model).double()
    losses, pooled = [], []
    for index, view in enumerate(views.unbind(1)):
        mask = draw_masked_patches((4, 5), (1, 1), 0.5, f"0/7/{index}").expand(3, -1)
        found = painter(view, bool_masked_pos=mask)
        losses.append(found.loss)
        pooled.append(found.reconstruction)
    torch.testing.assert_close(outputs.loss, torch.stack(losses).mean(), rtol=1e-10, atol=0)
    assert torch.equal(outputs.embeddings, outputs.representations)
    assert outputs.representations.shape == (3, 2, 32)
    assert set(outputs.parts) == {"reconstruction"}
    # another step has other masks, another seed as well
    model.begin_step(8, 10)
    assert model(views).loss != outputs.loss
    other = build(name, tiny_recipe, mask_seed=1).double().train()
    other.load_state_dict(model.state_dict())
    other.begin_step(7, 10)
    assert not torch.equal(other.objective.draw_mask(32, 40, "1/7/0"), model.objective.draw_mask(32, 40, "0/7/0"))
    assert not any(one.startswith("expander") for one in model.state_dict())


def test_what_is_painted_of_normalised_patches_has_the_images_mean(tiny_recipe):
    model = build("mae", tiny_recipe, norm_pix_loss=1).eval()
    pixels = 5 + torch.randn(2, 3, 32, 32)
    mask = model.objective.draw_mask(32, 32, "a").expand(2, -1)
    with torch.no_grad():
        painted = model.objective.paint(model.encoder, pixels, mask).pixels
    assert (painted.mean(-1) - patchify(pixels, (8, 8)).mean(-1)).abs().max() < 1


@pytest.mark.parametrize("name", SETTINGS)
def test_a_plan_has_patches_side_by_side_and_knows_its_memory(name):
    images = Images(count=1000, height=32, width=32, labelled=False)
    machine = Machine("cpu", "one core", cores=1, memory=2**32)
    given = {"dataset_name": "digits", "output_dir": "x", "objective": name}
    config = resolve(choose(given, images, machine, 60).settings)
    assert config.vicreg.encoder.patch_stride_hw == config.vicreg.encoder.patch_size_hw
    one, two = (step_memory(config, count) for count in (8, 16))
    assert 1.5 < two.encoder / one.encoder < 2.5


SMALL = {"objective": "mae", "model": {"hidden_size": 48, "num_attention_heads": 2}}


@pytest.mark.parametrize("size", [{"model": {"image_size": 32}}, {}], ids=["in-use", "neither"])
def test_small_images_can_be_planned_for(size):
    images = Images(count=40, height=36, width=36, labelled=False)
    machine = Machine("cpu", "one core", cores=1, memory=2**32)
    given = SMALL | {"dataset_name": "digits", "output_dir": "x", "model": SMALL["model"] | size.get("model", {})}
    assert resolve(choose(given, images, machine, 60).settings).vicreg.encoder.image_size_hw


def test_small_views_can_be_planned_for(image_folder, tmp_path, capsys):
    flags = ["--objective", "mae", "--views.image_size", "24", "--plan_only", "--output_dir", str(tmp_path / "run")]
    flags += [f"--model.{key}={value}" for key, value in SMALL["model"].items()]
    assert main(["pretrain", str(image_folder(40)), *flags]) == 0
    assert "Plan for 40 images" in capsys.readouterr().out


@pytest.mark.parametrize("name", SETTINGS)
def test_masks_are_of_the_views_and_so_is_the_picture(name, tmp_path, image_folder):
    """Used with images of a single tile: nothing is masked there, and nothing needs to be."""
    given = {"objective": name, name: SETTINGS[name], "views": {"image_size": 32, "crop_min_ratio": 0.2}}
    given |= {"model": MODEL | {"image_size": 16, "tile_size": 2, "num_hidden_layers": 1, "intermediate_size": 32}}
    given |= {"batch_size": 8, "max_steps": 2, "knn_every_epochs": 1, "vicreg": {"expander_sizes": [8]}}
    done = pretrain(out=tmp_path / "run", data=image_folder(16), **given)
    assert done.results["steps"] == 2
    with Image.open(tmp_path / "run" / masked_pictures.MASKED_FILE) as picture:
        assert picture.height == 3 * (96 + 4) - 4
    with pytest.raises(InputError, match=r"`mask_tile_size`: expected at least two tiles .* on the grid \(2, 2\)"):
        resolve({"dataset_name": "digits", "output_dir": "x"} | given | {"views": {"image_size": 16}})


MODEL = {"image_size": 32, "patch_size": 8, "tile_size": 1, "hidden_size": 48, "num_attention_heads": 2}
BAD = {
    "ratio": ({"mae": {"mask_ratio": 1.0}}, r"`mask_ratio`: expected a share of the tiles in \(0, 1\), got 1.0"),
    "negative": ({"mae": {"mask_tile_size": -1}}, "`mask_tile_size`: expected a side in patches, or 0"),
    "one tile": ({"model": MODEL | {"tile_size": 4}}, "`mask_tile_size`: expected at least two tiles"),
    "overlap": ({"model": MODEL | {"patch_stride": 4}}, "`patch_stride`: expected `patch_size`"),
    "normalised": ({"mae": {"norm_pix_loss": 2}}, "`norm_pix_loss`: expected 0 or 1, got 2"),
    "decoder": ({"mae": {"decoder_hidden_size": 10}}, "`decoder_hidden_size`: expected a multiple of 4 times"),
    "batch norm": ({"model": {"model_type": "resnet"}}, "without batch norms, got 'resnet'"),
    "teacher": ({"teacher": "x"}, "`teacher`: expected none with objective 'mae'"),
    "compiled": ({"torch_compile": True}, "`torch_compile`: expected none with objective 'mae'"),
    "two": ({"second_model": {"hidden_size": 192}}, "`second_model`: expected none with objective 'mae'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(case):
    given, message = BAD[case]
    with pytest.raises(InputError, match=message) as caught:
        resolve({"dataset_name": "digits", "output_dir": "x", "objective": "mae", "model": MODEL} | given)
    assert "\n" not in str(caught.value)
