"""Images that cannot be used among good ones: `prepare`, `embed` and `inspect views` skip them and name them."""

import json
import tracemalloc

import numpy as np
import pytest
import tifffile
from PIL import Image

from hf_vicreg import BigBirdViTConfig, BigBirdViTImageProcessor, BigBirdViTModel
from hf_vicreg.cli import main
from hf_vicreg.training.images.channels.folders import channel_folder


@pytest.fixture
def folder(tmp_path):
    """Three files of two pages of four tiles; the last tile of one page is damaged."""
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 4000, (3, 2, 128, 128)).astype(np.uint16)
    for number, pages in enumerate(pixels):
        path = tmp_path / "images" / f"{number}.tif"
        tifffile.imwrite(path, pages, photometric="minisblack", metadata=None, compression="zlib", tile=(64, 64))
    path = tmp_path / "images" / "1.tif"
    with tifffile.TiffFile(path) as file:
        place = file.pages[1].dataoffsets[3]
    content = bytearray(path.read_bytes())
    content[place : place + 20] = bytes(20)
    path.write_bytes(content)
    return tmp_path / "images"


@pytest.fixture
def model(tmp_path):
    """A model of one channel, of values up to 4,000."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BigBirdViTModel(BigBirdViTConfig(**sizes, image_size=16, patch_size=8, num_channels=1)).save_pretrained(
        tmp_path / "model"
    )
    BigBirdViTImageProcessor(
        channel_low=[0.0],
        channel_high=[4000.0],
        image_mean=[0.5],
        image_std=[0.2],
        do_rescale=False,
        do_convert_rgb=False,
        size={"height": 16, "width": 16},
    ).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_an_image_damaged_inside_is_skipped_and_named(folder, model, tmp_path, capsys):
    source = channel_folder(str(folder), 1)
    assert [source.read(index) is None for index in range(6)] == [False, False, False, True, False, False]
    assert "damaged image" in source.why(3)
    out, flags = str(tmp_path / "out"), ["--num_channels", "1"]
    assert main(["prepare", str(folder), out, *flags, "--num_proc", "1"]) == 0
    assert "train: 5 images stored, 1 unreadable skipped: 1.tif, image 1" in capsys.readouterr().out
    assert main(["embed", str(folder), model, str(tmp_path / "e"), "--device", "cpu", "--num_workers", "0"]) == 0
    (one,) = (json.loads(line) for line in (tmp_path / "e" / "unusable.jsonl").read_text().splitlines())
    assert (one["name"], one["kind"]) == ("1.tif, image 1", "damaged")
    assert main(["inspect", "views", str(folder), str(tmp_path / "v.png"), *flags, "--preset", "microscopy"]) == 0


@pytest.fixture
def huge(tmp_path):
    """A file of more pixels than are read at once."""
    (tmp_path / "huge").mkdir()
    tifffile.imwrite(
        tmp_path / "huge" / "a.tif", np.zeros((12000, 12000), np.uint8), tile=(512, 512), compression="zlib"
    )
    return tmp_path / "huge"


def test_an_oversized_file_is_refused_before_it_is_decoded(huge):
    source = channel_folder(str(huge), 1)
    tracemalloc.start()
    refusal = source.refusal(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refusal.kind == "too large"
    assert peak < 12000 * 12000 / 10


def test_where_no_image_can_be_read_the_first_ones_reason_is_given(huge, model, tmp_path, capsys):
    reason = "a.tif: 12000x12000 pixels refused, at most 134,217,728 are read at once; store it by windows: "
    remedy = "hf-vicreg prepare IMAGES OUT --num_channels N --window 1024."
    assert main(["embed", str(huge), model, str(tmp_path / "e"), "--device", "cpu", "--num_workers", "0"]) == 2
    said = capsys.readouterr().err
    assert f"error: `IMAGES`: expected readable images in huge, none of 1 can be read; {reason}{remedy}" in said
    assert main(["prepare", str(huge), str(tmp_path / "out"), "--num_channels", "1"]) == 2
    assert reason + remedy in capsys.readouterr().err


@pytest.mark.parametrize(
    ("images", "out", "message"),
    [
        ("good", "nowhere/views.png", "`out`: expected a file in a folder that is there"),
        ("good", ".", "`out`: expected a file"),
        ("bad", "views.png", "expected readable images in bad, found 1 of 1 corrupt, a.png"),
    ],
)
def test_a_contact_sheet_that_cannot_be_drawn_is_refused_in_a_line(images, out, message, tmp_path, capsys):
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "good" / "a.png")
    (tmp_path / "bad" / "a.png").write_bytes(b"\x89PNG")
    assert main(["inspect", "views", str(tmp_path / images), str(tmp_path / out)]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
