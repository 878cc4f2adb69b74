"""`hf-vicreg evaluate dense`: patches and their classes by hand, perfect features, and the command as written."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hf_vicreg import BigBirdViTConfig, BigBirdViTImageProcessor, BigBirdViTModel
from hf_vicreg.cli import main
from hf_vicreg.training.evaluation.linear import fit_linear_probe
from hf_vicreg.training.evaluation.neighbours import knn_predictions, votes_of
from hf_vicreg.training.tasks.segmentation import dense, patches
from hf_vicreg.training.tasks.segmentation.masks import IGNORED


@pytest.mark.parametrize(("height", "width", "rows", "columns"), [(8, 8, 4, 4), (10, 7, 3, 2), (12, 9, 5, 4)])
def test_a_patch_has_the_class_of_most_of_its_pixels(height, width, rows, columns):
    classes = torch.randint(0, 4, (height, width), generator=torch.Generator().manual_seed(height))
    classes[classes == 3] = IGNORED
    classes[:2, :2] = IGNORED
    found = patches.classes_of_patches(classes, rows, columns, 3)
    for row in range(rows):
        for column in range(columns):
            own = [
                int(classes[y, x])
                for y in range(height)
                for x in range(width)
                if y * rows // height == row and x * columns // width == column and classes[y, x] != IGNORED
            ]
            counts = [own.count(one) for one in range(3)]
            assert found[row, column] == (counts.index(max(counts)) if own else IGNORED)


def test_pixels_of_patches_are_those_below_them():
    pixels = torch.randn(2, 3, 8, 12)
    found = patches.pixels_of_patches(pixels, 2, 3)
    assert found.shape == (2, 2, 3, 3 * 16)
    torch.testing.assert_close(found[1, 1, 2], pixels[1, :, 4:8, 8:12].flatten())
    assert patches.pixels_of_patches(pixels, 3, 5).shape == (2, 3, 5, 3 * 4)  # parts of one size, magnified


def test_shares_of_votes_are_those_of_a_loop_and_the_highest_is_the_prediction():
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(count, 5, generator=generator) for count in (40, 7))
    labels = torch.randint(0, 3, (40,), generator=generator)
    found = votes_of(bank, labels, queries, neighbours=6, temperature=0.1, classes=4)
    cosines = torch.nn.functional.cosine_similarity(queries[:, None], bank[None], dim=-1).double()
    for query in range(7):
        nearest = cosines[query].argsort(descending=True)[:6]
        shares = torch.zeros(4, dtype=torch.float64)
        for one in nearest:
            shares[labels[one]] += torch.exp(cosines[query, one] / 0.1)
        torch.testing.assert_close(found[query], shares / shares.sum(), rtol=1e-4, atol=1e-6)
    (predicted,) = knn_predictions(bank, labels, queries, neighbours=[6], temperature=0.1).values()
    assert torch.equal(found.argmax(1), predicted)


def test_probabilities_of_classes_that_were_never_seen_are_none():
    features = torch.randn(30, 4)
    labels = torch.where(features[:, 0] > 0, 2, 0)
    probe = fit_linear_probe(features, labels, held_out_ratio=0.2, seed=0, classes=4)
    found = probe.probabilities(features)
    assert found.shape == (30, 4)
    assert (found[:, [1, 3]] == 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones(30, dtype=torch.float64))
    assert (found.argmax(1) == labels).all()


def squares(folder, split, sizes):
    """Bright squares on dark ground, each square a cell of 8 pixels, and their masks."""
    (folder / split / "masks").mkdir(parents=True)
    generator, lines = np.random.default_rng(len(sizes)), []
    for index, (height, width) in enumerate(sizes):
        cells = generator.random((height // 8, width // 8)) > 0.5
        mask = np.kron(cells, np.ones((8, 8))).astype(np.uint8)
        pixels = (mask[..., None] * 150 + generator.integers(20, 60, (height, width, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / split / f"{index}.png")
        Image.fromarray(mask).save(folder / split / "masks" / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "mask_file_name": f"masks/{index}.png"}))
    (folder / split / "metadata.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    squares(folder / "my_masks", "train", [(32, 32)] * 6 + [(48, 40)])
    squares(folder / "my_masks", "test", [(32, 32), (24, 16), (40, 72)])
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = BigBirdViTConfig(**sizes, image_size=32, patch_size=8, tile_size=1)
    BigBirdViTModel(config).save_pretrained(folder / "model")
    BigBirdViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "model")
    return folder


def test_masks_are_found_by_patches_without_tuning(workplace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = f"evaluate dense {workplace}/model --dataset_name {workplace}/my_masks --image_height 32 --image_width 32"
    assert main([*words.split(), "--neighbours", "3", "--output_dir", "out"]) == 0
    printed = capsys.readouterr().out
    (record,) = json.loads((tmp_path / "out" / "results.json").read_text())["evaluations"]
    metrics = record["metrics"]
    assert record["task"] == "dense"
    assert record["data"]["class_names"] == ["0", "1"]
    assert len(metrics) == 3 * 2 * 3
    # a cell is a patch, and bright or dark
    for kind in ("pixels_knn", "pixels_linear", "knn", "linear"):
        assert metrics[f"{kind}_pixel_accuracy"] > 0.9, metrics
        assert metrics[f"{kind}_mean_iou"] > 0.8
        assert f"{metrics[f'{kind}_dice']:.3f}" in printed
    again = main([*words.split(), "--neighbours", "3", "--output_dir", "again"])
    assert again == 0
    (same,) = json.loads((tmp_path / "again" / "results.json").read_text())["evaluations"]
    assert same["metrics"] == metrics


def test_figures_are_those_of_the_counts():
    counts = np.array([[6, 2], [1, 3]])
    found = dense.summary_of(counts, ["ground", "cell"])
    assert found == pytest.approx({"pixel_accuracy": 9 / 12, "mean_iou": (6 / 9 + 3 / 6) / 2, "dice": 6 / 9})


def test_patches_of_one_class_are_one_line(tmp_path, workplace, monkeypatch, capsys):
    squares(tmp_path / "my_masks", "train", [(32, 32)])
    squares(tmp_path / "my_masks", "test", [(32, 32)])
    mask = np.zeros((32, 32), np.uint8)
    mask[10, 10] = 1  # never most of a patch
    Image.fromarray(mask).save(tmp_path / "my_masks" / "train" / "masks" / "0.png")
    monkeypatch.chdir(tmp_path)
    words = f"evaluate dense {workplace}/model --dataset_name my_masks --image_height 32 --image_width 32"
    assert main([*words.split(), "--output_dir", "out"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: `image_height`: expected patches of at least 2 classes, those 16 drawn")


def test_test_images_that_cannot_be_read_are_one_line(tmp_path, workplace, monkeypatch, capsys):
    squares(tmp_path / "my_masks", "train", [(32, 32)] * 2)
    squares(tmp_path / "my_masks", "test", [(32, 32)])
    image = tmp_path / "my_masks" / "test" / "0.png"
    image.write_bytes(image.read_bytes()[:200])  # its size can be read, its pixels cannot
    monkeypatch.chdir(tmp_path)
    words = f"evaluate dense {workplace}/model --dataset_name my_masks --image_height 32 --image_width 32"
    assert main([*words.split(), "--output_dir", "out"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: `test_split`: expected readable images, none of 1 can be read; ")
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "`dataset_name`: expected images with masks"),
        ("--dataset_name DATA --seed -1", "`seed`: expected an integer from 0 to 4294966295, got -1"),
        ("--dataset_name DATA --neighbours 0", "`neighbours`: expected at least 1, got 0"),
        ("--dataset_name DATA --test_split train", "`test_split`: expected another split than the 'train' trained on"),
        ("--dataset_name DATA --mask_column_name cells", "`mask_column_name`: expected a column 'cells'"),
        (
            "--dataset_name DATA --image_height 4",
            "`image_height`: `pixel_values`: expected an image of at least one patch",
        ),
    ],
)
def test_bad_input_is_one_line(workplace, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    words = flags.replace("DATA", str(workplace / "my_masks")).split()
    assert main(["evaluate", "dense", str(workplace / "model"), *words, "--output_dir", "out"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
