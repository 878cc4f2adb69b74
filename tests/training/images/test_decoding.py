"""Files as people have them: odd kinds are read right, broken ones are refused and counted exactly."""

import json
import random
import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from hf_vicreg import pretrain
from hf_vicreg.training.images.decoding import MAX_PIXELS, UnusableImage, decode
from hf_vicreg.training.images.order import joint_reduction
from hf_vicreg.training.images.sources import load_sources
from hf_vicreg.training.images.views import ViewSampler, crop_box
from hf_vicreg.training.run.arguments import ViewsConfig


def encoded(image, form, **options):
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def ramp(width=64, height=48):
    """A smooth picture: red grows to the right, green downwards."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 90)], -1).astype(np.uint8))


def png_header(width, height):
    """A PNG that claims a size and holds no pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def broken():
    """Eight ways for an image to be of no use, by name; the values are file contents, None a link to nothing."""
    png, jpeg = encoded(ramp(), "PNG"), encoded(ramp(), "JPEG")
    return {
        "empty.jpg": b"",
        "web_page.jpg": b"<!DOCTYPE html><title>404 Not Found</title>",
        "cut_short.jpg": jpeg[: len(jpeg) // 2],
        "cut_short.png": png[: len(png) // 2],
        "overwritten.png": png[: len(png) // 2] + bytes(40) + png[len(png) // 2 + 40 :],
        "zeros.png": bytes(len(png)),
        "one_pixel.png": encoded(Image.new("RGB", (1, 1)), "PNG"),
        "gone.jpg": None,
    }


REASONS = {
    "empty.jpg": "empty file",
    "web_page.jpg": "not an image (a web page)",
    "cut_short.jpg": "truncated JPEG",
    "cut_short.png": "truncated PNG",
    "overwritten.png": "damaged PNG",
    "zeros.png": "not an image",
    "one_pixel.png": "1x1 pixels, smaller than a patch of 8x8 (width x height)",
    "gone.jpg": "missing file",
}


def odd():
    """Files that are fine, of kinds that are easily read wrong."""
    picture = ramp()
    grey16 = Image.fromarray((np.asarray(picture.convert("L")).astype(np.uint16) << 8) + 77)
    others = [picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "cmyk.jpg": encoded(picture.convert("CMYK"), "JPEG"),
        "palette.png": encoded(picture.quantize(64), "PNG"),
        "palette_transparent.png": encoded(picture.quantize(64), "PNG", transparency=bytes(range(64))),
        "grey16.png": encoded(grey16, "PNG"),
        "grey16.tiff": encoded(grey16, "TIFF"),
        "animated.gif": encoded(picture, "GIF", save_all=True, append_images=others),
        "animated.webp": encoded(picture, "WEBP", save_all=True, append_images=others, lossless=True),
        "turned.jpg": encoded(picture.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=turned, quality=95),
        "broken_exif.jpg": encoded(picture, "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff", quality=95),
    }


@pytest.mark.parametrize("name", odd())
def test_odd_kinds_show_the_same_picture(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = decode(odd()[name])
    assert (image.mode, image.size) == ("RGB", (64, 48))
    expected = ramp().convert("L").convert("RGB") if name.startswith("grey16") else ramp()
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int))
    assert difference.mean() < 6  # palettes and JPEG are coarse; a wrong turn or range is off by dozens


@pytest.mark.parametrize("name", [name for name, content in broken().items() if content is not None])
def test_broken_files_are_refused(name):
    with pytest.raises(Exception, match=r".*"):
        decode(broken()[name], min_size=(4, 4))


@pytest.mark.parametrize("name", REASONS)
def test_reasons_are_plain_words(tmp_path, name):
    content = broken()[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    else:
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    source, _ = load_sources(train_dir=str(tmp_path))
    assert source.at_least(8, 8).why(0).startswith(REASONS[name])
    assert source.at_least(8, 8).read(0) is None


def test_sizes_floats_and_folders_have_reasons_too(tmp_path):
    (tmp_path / "a_bomb.png").write_bytes(png_header(60_000, 60_000))
    Image.fromarray(np.ones((20, 20), np.float32)).save(tmp_path / "b_float.tiff")
    (tmp_path / "c_fine.png").write_bytes(encoded(ramp(), "PNG"))
    source, _ = load_sources(train_dir=str(tmp_path))
    assert source.why(0) == "60000x60000 pixels refused, at most 134,217,728 are decoded"
    assert source.why(1) == "float image: what its values mean is not known"
    assert source.why(2) is None


def test_one_pixel_is_an_image_where_it_is_large_enough():
    image = decode(encoded(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG"))
    crop, _ = ViewSampler.of_views(ViewsConfig(flip_probability=0), (16, 16))[0](image, random.Random(0))
    assert crop.shape == (3, 16, 16)
    assert crop[:, 0, 0].tolist() == crop[:, 15, 15].tolist() == [9, 8, 7]


@pytest.mark.parametrize("side", [12_000, 40_000], ids=["above-our-limit", "above-pillows"])
def test_bombs_are_refused_by_their_header(side):
    """There are no pixels behind it: to decode them would fail as well, but later."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnusableImage, match="refused, at most"):
            decode(png_header(side, side))


def test_a_huge_jpeg_is_decoded_smaller():
    side = 13_000
    assert side**2 > MAX_PIXELS
    huge = encoded(Image.new("L", (side, side), 130), "JPEG", quality=50)
    image = decode(huge)  # Pillow warns at this size, and refuses it at 1.06 times of it
    assert image.size == (side // 2, side // 2)
    assert image.getpixel((7, 7)) == (130, 130, 130)


def test_jpegs_are_decoded_as_small_as_the_crops_allow():
    content = encoded(ramp(1600, 1200), "JPEG", quality=95)
    sizes = {
        wanted: decode(content, reduction=lambda width, height, wanted=wanted: wanted).size for wanted in range(1, 12)
    }
    assert sizes[1] == (1600, 1200)
    assert sizes[2] == sizes[3] == (800, 600)
    assert sizes[4] == sizes[7] == (400, 300)
    assert sizes[8] == sizes[11] == (200, 150)
    seen = []
    decode(encoded(ramp(1200, 1600), "JPEG", exif=turned()), reduction=lambda *size: seen.append(size) or 1)
    assert seen == [(1600, 1200)]  # as it is shown, not as it is stored
    # a PNG cannot be: the whole of it is decoded
    assert decode(encoded(ramp(160, 120), "PNG"), reduction=lambda width, height: 8).size == (160, 120)


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_smaller_decoding_shows_the_same_view():
    """Each crop still has the view's pixels, and the view is the picture's at that place."""
    content = encoded(ramp(1600, 1200), "JPEG", quality=95)
    samplers = ViewSampler.of_views(ViewsConfig(), (96, 96))
    reductions = [joint_reduction(samplers, f"0/0/{index}", 1600, 1200) for index in range(200)]
    assert {min(8, reduction) for reduction in reductions} >= {3, 4, 6, 8}
    whole = decode(content)
    for index, reduction in enumerate(reductions[:20]):
        small = decode(content, reduction=lambda width, height, wanted=reduction: wanted)
        for sampler in samplers:
            box = crop_box(*small.size, sampler.crop_ratios, random.Random(f"0/0/{index}/{sampler.view}"))
            assert min(box[2:]) >= 95
            view, _ = sampler(small, random.Random(f"0/0/{index}/{sampler.view}"))
            full, _ = sampler(whole, random.Random(f"0/0/{index}/{sampler.view}"))
            assert (view.int() - full.int()).abs().float().mean() < 3


@pytest.mark.timeout(300)
def test_two_thousand_images_with_broken_ones_train_and_are_counted(tmp_path, tiny_recipe, caplog):
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    tile = encoded(Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)), "JPEG")
    bad = {}
    for index in range(2000 - len(odd())):
        name, content = list(broken().items())[index // 99 % 8]
        path = folder / (f"{index:04d}_{name}" if index % 99 == 50 else f"{index:04d}.jpg")
        if index % 99 != 50:
            path.write_bytes(tile)
            continue
        bad[path.name] = content
        if content is None:
            path.symlink_to(tmp_path / "nowhere.jpg")
        else:
            path.write_bytes(content)
    for name, content in odd().items():
        (folder / name).write_bytes(content)
    assert len(list(folder.iterdir())) == 2000
    assert len(bad) == 20
    assert len({name.split("_", 1)[1] for name in bad}) == 8
    settings = tiny_recipe | {"batch_size": 100, "model": tiny_recipe["model"] | {"image_size": 16}}
    result = pretrain(out=tmp_path / "run", data=folder, **settings)
    assert result.results["num_images"] == 2000
    assert result.results["steps"] == 20
    assert json.loads((tmp_path / "run" / "results.json").read_text())["unusable_images"] == 20
    source, _ = load_sources(train_dir=str(folder))
    assert "20 image(s) were" in caplog.text
    entries = [json.loads(line) for line in (tmp_path / "run" / "unusable.jsonl").read_text().splitlines()]
    assert {one["name"] for one in entries} == set(bad)
    for one in entries:
        assert one["reason"].startswith(REASONS[one["name"].split("_", 1)[1]])
        assert source.describe(one["index"]) == one["name"]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_00000020" / "state.json").read_text())
    assert {source.describe(index) for index in state["unusable"]} == set(bad)
