"""Files of science: each depth, number of channels, format and layout gives the documented pixels, everywhere."""

import json
from io import BytesIO

import imagecodecs
import numpy as np
import pydicom
import pytest
import tifffile
import torch
import zarr
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from transformers import AutoImageProcessor

from hf_vicreg import BigBirdViTImageProcessor, pretrain
from hf_vicreg.cli import main
from hf_vicreg.modeling import channel_layout
from hf_vicreg.modeling.channel_files import open_channels
from hf_vicreg.modeling.channel_layout import UnreadableChannels
from hf_vicreg.modeling.image_processing_pil_bigbird_vit import BigBirdViTImageProcessorPil
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.channels.channel_source import as_channels
from hf_vicreg.training.images.channels.folders import channel_folder
from hf_vicreg.training.images.channels.measuring import measure
from hf_vicreg.training.images.colour import NEUTRAL, finish_views
from hf_vicreg.training.images.sources import load_sources

HEIGHT, WIDTH = 37, 45
MODEL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 16,
    "patch_size": 8,
}
RANGES = {"uint8": (0, 255), "uint16": (0, 4095), "int16": (-1000, 3000), "float32": (-2.5, 7.5)}


def pixels_of(dtype, channels, seed=0):
    low, high = RANGES[dtype]
    values = np.random.default_rng(seed).uniform(low, high, (HEIGHT, WIDTH, channels))
    return values.astype(dtype)


def write_tiff(path, pixels, layout):
    planes = pixels.transpose(2, 0, 1)
    grey = {"photometric": "minisblack"}
    if layout == "chunky":
        tifffile.imwrite(path, pixels, planarconfig="contig" if pixels.shape[2] > 1 else None, **grey)
    elif layout == "planar":
        tifffile.imwrite(path, planes, planarconfig="separate", compression="zlib", **grey)
    elif layout == "tiled":
        tifffile.imwrite(path, planes, planarconfig="separate", tile=(16, 32), compression="zlib", **grey)
    elif layout == "pages":
        tifffile.imwrite(path, planes, **grey)
    elif layout == "ome":
        tifffile.imwrite(path, planes, metadata={"axes": "CYX"}, ome=True, **grey)
    else:
        tifffile.imwrite(path, planes, imagej=True, metadata={"axes": "CYX"})


def write_zarr(path, planes, version, axes="tczyx"):
    group = zarr.open_group(path, mode="w", zarr_format=version)
    shape = tuple({"c": len(planes), "y": HEIGHT, "x": WIDTH}.get(axis, 1) for axis in axes)
    array = group.create_array("0", shape=shape, chunks=tuple(min(one, 16) for one in shape), dtype=planes.dtype)
    array[:] = planes.reshape(shape)
    scales = [{"axes": [{"name": axis, "type": "space"} for axis in axes], "datasets": [{"path": "0"}]}]
    group.attrs.update({"multiscales": scales} if version == 2 else {"ome": {"version": "0.5", "multiscales": scales}})


def write_dicom(path, planes, **tags):
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    data = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    data.Rows, data.Columns, data.SamplesPerPixel, data.NumberOfFrames = HEIGHT, WIDTH, 1, len(planes)
    data.BitsAllocated = data.BitsStored = 8 * planes.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(planes.dtype.kind == "i")
    data.PhotometricInterpretation = "MONOCHROME2"
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = planes.tobytes() + bytes(planes.nbytes % 2)
    data.save_as(path, enforce_file_format=True)


def write(path, pixels, form, layout):
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    if form == "tif":
        write_tiff(path, pixels, layout)
    elif form == "npy":
        np.save(path, pixels if layout == "last" else planes)
    elif form == "zarr":
        write_zarr(path, planes, int(layout))
    elif form == "dcm":
        write_dicom(path, planes)
    elif layout == "png16":
        import imagecodecs

        path.write_bytes(imagecodecs.png_encode(pixels))
    else:
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(path)


MATRIX = (
    [
        (dtype, channels, "tif", layout)
        for dtype in RANGES
        for channels, layout in ((1, "chunky"), (5, "chunky"), (5, "planar"), (5, "tiled"), (5, "pages"), (5, "ome"))
    ]
    + [(dtype, 2, "tif", "imagej") for dtype in ("uint8", "uint16", "float32")]
    + [(dtype, channels, "npy", layout) for dtype in RANGES for channels, layout in ((5, "last"), (2, "first"))]
    + [(dtype, 5, "zarr", version) for dtype in RANGES for version in ("2", "3")]
    + [(dtype, channels, "dcm", "frames") for dtype in ("uint8", "uint16", "int16") for channels in (1, 5)]
    + [
        ("uint16", 1, "png", "grey"),
        ("uint8", 1, "png", "grey"),
        ("uint16", 3, "png", "png16"),
        ("uint8", 3, "png", ""),
    ]
    + [("float32", 64, "tif", "planar"), ("uint16", 64, "npy", "last")]
    + [("uint16", 13, "tif", "chunky"), ("int16", 13, "tif", "planar")]
)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    """A folder for each number of channels, a file for each row of the matrix."""
    root = tmp_path_factory.mktemp("matrix")
    for number, (dtype, channels, form, layout) in enumerate(MATRIX):
        folder = root / str(channels)
        folder.mkdir(exist_ok=True)
        write(folder / f"{number:02d}.{form}", pixels_of(dtype, channels, number), form, layout)
    return root


def processor_of(channels, dtype, kind=BigBirdViTImageProcessor):
    low, high = RANGES[dtype]
    spread = [float(one) for one in np.linspace(0, 1, channels)]
    return kind(
        channel_low=[low + 0.1 * (high - low) * one for one in spread],
        channel_high=[high - 0.1 * (high - low) * one for one in spread],
        image_mean=[0.3 + 0.3 * one for one in spread],
        image_std=[0.2 + 0.2 * one for one in spread],
        do_rescale=False,
        do_convert_rgb=False,
        size={"height": HEIGHT, "width": WIDTH},
    )


def formula(pixels, processor):
    """As documented, in double precision: scaled by channel, kept within 0 and 1, normalised."""
    low, high, mean, std = (
        np.array(getattr(processor, name)) for name in ("channel_low", "channel_high", "image_mean", "image_std")
    )
    return (((pixels - low) / (high - low)).clip(0, 1) - mean) / std


def test_the_matrix_is_as_large_as_promised():
    assert len(MATRIX) >= 40
    assert len(set(MATRIX)) == len(MATRIX)


@pytest.mark.parametrize("number", range(len(MATRIX)), ids=["-".join(map(str, row)) for row in MATRIX])
def test_a_file_gives_the_pixels_of_the_formula_to_training_and_to_the_processors(matrix, number):
    dtype, channels, form, _ = MATRIX[number]
    path, pixels = matrix / str(channels) / f"{number:02d}.{form}", pixels_of(dtype, channels, number)
    source = channel_folder(str(path.parent), channels)
    read = np.asarray(source.read_or_raise(source.file_names.index(path.name)))
    assert read.dtype == pixels.dtype  # on the way to the device, too
    np.testing.assert_array_equal(read, pixels)
    lazy = open_channels(str(path), channels, lazy=True)
    np.testing.assert_array_equal(lazy.read(0, 0, (3, 5, 31, 30)), pixels[5:30, 3:31])
    for kind in (BigBirdViTImageProcessor, BigBirdViTImageProcessorPil):
        processor = processor_of(channels, dtype, kind)
        expected = formula(pixels.astype(np.float64), processor).transpose(2, 0, 1)
        for image in (str(path), pixels, torch.from_numpy(pixels.transpose(2, 0, 1).copy())):
            found = processor(image, return_tensors="np")["pixel_values"][0]
            np.testing.assert_allclose(found, expected, atol=2e-6, rtol=0)  # of values up to 3.5
        crops = torch.from_numpy(read).permute(2, 0, 1)[None]
        normalisation = (processor.image_mean, processor.image_std)
        ranges = (processor.channel_low, processor.channel_high)
        trained = finish_views(crops, torch.tensor([NEUTRAL]), normalisation, ranges)[0].numpy()
        np.testing.assert_allclose(trained, found, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "channels", [pytest.param(one, marks=[pytest.mark.slow] if one != 5 else []) for one in (1, 2, 3, 5, 13, 64)]
)
def test_files_of_a_number_of_channels_are_trained_on_and_load_again(matrix, tmp_path, channels):
    flags = {"normalisation": "percentile"} if channels == 3 else {}
    count = sum(row[1] == channels for row in MATRIX)
    done = pretrain(
        out=tmp_path / "run",
        data=matrix / str(channels),
        model=MODEL | {"num_channels": channels},
        vicreg={"expander_sizes": [16, 16]},
        batch_size=2,
        max_steps=5,
        device="cpu",
        seed=0,
        **flags,
    )
    assert done.results["num_images"] == count
    assert not (done.output_dir / "unusable.jsonl").exists()
    processor = AutoImageProcessor.from_pretrained(done.output_dir)
    assert len(processor.channel_low) == channels
    assert done.processor.to_dict() == processor.to_dict()
    path = next((matrix / str(channels)).iterdir())
    pixels = processor(str(path), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, channels, 16, 16)
    assert done.encoder(pixels).pooler_output.isfinite().all()
    assert float(pixels.abs().max()) < 20


def test_the_normalisation_is_measured_stored_and_kept_when_resumed(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(6):
        np.save(folder / f"{number}.npy", pixels_of("uint16", 2, number) * np.array([1, 4], "uint16"))
    source = channel_folder(str(folder), 2)
    values = np.concatenate([np.asarray(source.read_or_raise(one)).reshape(-1, 2) for one in range(6)])
    low, high = np.percentile(values.astype(float), (0.5, 99.5), axis=0)
    found = measure(source, "percentile")
    np.testing.assert_allclose(found.channel_low, low)
    np.testing.assert_allclose(found.channel_high, high)
    scaled = ((values - low) / (high - low)).clip(0, 1)
    np.testing.assert_allclose(found.image_mean, scaled.mean(0))
    np.testing.assert_allclose(found.image_std, scaled.std(0))
    assert measure(source, "minmax").channel_high == [values[:, 0].max(), values[:, 1].max()]
    flags = {
        "out": tmp_path / "run",
        "data": folder,
        "model": MODEL | {"num_channels": 2},
        "vicreg": {"expander_sizes": [16, 16]},
        "batch_size": 2,
        "device": "cpu",
        "normalisation": "fixed 0 16380",
    }
    pretrain(**flags, max_steps=2)
    np.save(folder / "0.npy", pixels_of("uint16", 2, 99))  # what was measured does not change with what lies there
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run")
    assert (processor.channel_low, processor.channel_high) == ([0.0, 0.0], [16380.0, 16380.0])
    stored = json.loads((tmp_path / "run" / "preprocessor_config.json").read_text())
    assert stored["image_processor_type"] == "BigBirdViTImageProcessor"


@pytest.mark.parametrize(("gap", "tag"), [(-3.4028235e38, "-3.4028234663852886e+38"), (np.nan, "nan"), (np.inf, None)])
def test_pixels_without_a_value_are_not_measured(tmp_path, gap, tag):
    pixels = np.random.default_rng(0).uniform(280, 300, (64, 64)).astype(np.float32)
    pixels[:, :10] = gap
    tags = [] if tag is None else [(42113, "s", 0, tag, True)]
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack", extratags=tags)
    found = measure(channel_folder(str(tmp_path), 1), "minmax")
    assert found.channel_low == [pixels[:, 10:].min()]
    assert found.channel_high == [pixels[:, 10:].max()]
    assert found.image_mean == pytest.approx([0.5], abs=0.02)
    processor = processor_of(1, "float32", BigBirdViTImageProcessor)
    assert torch.isfinite(processor(str(tmp_path / "a.tif"), return_tensors="pt")["pixel_values"]).all()


def test_resizing_is_the_same_in_both_forms_of_the_processor():
    pixels = pixels_of("float32", 5)
    found = [
        processor_of(5, "float32", kind)(pixels, size={"height": 20, "width": 24}, return_tensors="np")["pixel_values"]
        for kind in (BigBirdViTImageProcessor, BigBirdViTImageProcessorPil)
    ]
    assert found[0].shape == (1, 5, 20, 24)
    np.testing.assert_allclose(*found, atol=1e-4)  # two libraries' bicubic filters


def test_an_encoded_image_of_a_table_is_read_as_its_file_is():
    from hf_vicreg.training.images.image_source import ImageSource

    pixels = pixels_of("uint16", 5)
    buffer = BytesIO()
    tifffile.imwrite(buffer, pixels, planarconfig="contig", photometric="minisblack")
    table = as_channels(ImageSource("table", 1, lambda index: buffer.getvalue(), "x"), 5)
    np.testing.assert_array_equal(np.asarray(table.read(0)), pixels)


def test_pages_are_channels_or_images_as_asked(tmp_path):
    planes = pixels_of("uint16", 4).transpose(2, 0, 1)
    stack = np.stack([planes, planes + 1, planes + 2])  # three of a depth, four channels each
    tifffile.imwrite(tmp_path / "a.tif", stack, metadata={"axes": "ZCYX"}, photometric="minisblack", ome=True)
    as_images = channel_folder(str(tmp_path), 4)
    assert len(as_images) == 3
    for page in range(3):
        np.testing.assert_array_equal(np.asarray(as_images.read(page)), stack[page].transpose(1, 2, 0))
    assert as_images.describe(1) == "a.tif, image 1"
    for pages in (None, "channels"):
        as_one = channel_folder(str(tmp_path), 12, pages)
        assert len(as_one) == 1
        np.testing.assert_array_equal(np.asarray(as_one.read(0)), stack.reshape(12, HEIGHT, WIDTH).transpose(1, 2, 0))
    with pytest.raises(UnreadableChannels, match=r"4 channel.s. and 3 pages where 5 are wanted"):
        open_channels(str(tmp_path / "a.tif"), 5)


def test_positions_of_one_file_are_images(tmp_path):
    """Several fields of one sample lie in one OME-TIFF, or in one folder as bioformats2raw writes it."""
    fields = [pixels_of("uint16", 2, seed).transpose(2, 0, 1) for seed in range(3)]
    thumbnail = fields[0][:, :8, :8]
    for folder in ("tif", "zarr"):
        (tmp_path / folder).mkdir()
    with tifffile.TiffWriter(tmp_path / "tif" / "a.ome.tif", ome=True) as file:
        for one in (*fields, thumbnail):
            file.write(one, metadata={"axes": "CYX"}, photometric="minisblack")
    collected = zarr.open_group(tmp_path / "zarr" / "a.zarr", mode="w", zarr_format=2)
    collected.attrs["bioformats2raw.layout"] = 3
    collected.create_group("OME")
    for name, one in enumerate(fields):
        write_zarr(tmp_path / "zarr" / "a.zarr" / str(name), one, 2)
    for folder in ("tif", "zarr"):
        for window, boxes in ((None, [(0, WIDTH)] * 3), (40, [(0, 40), (WIDTH - 40, WIDTH)] * 3)):
            source = channel_folder(str(tmp_path / folder), 2, window=window)
            assert len(source) == len(boxes), folder
            for index, (left, right) in enumerate(boxes):
                expected = fields[index * 3 // len(boxes)].transpose(1, 2, 0)[:, left:right]
                np.testing.assert_array_equal(np.asarray(source.read(index)), expected)


def test_pages_are_found_though_few_files_have_several(tmp_path):
    one = pixels_of("uint16", 1)[:, :, 0]
    for name in range(150):
        tifffile.imwrite(tmp_path / f"{name:03}.tif", one[:8, :8], photometric="minisblack")
    tifffile.imwrite(tmp_path / "100.tif", np.stack([one, one + 1, one + 2]), photometric="minisblack")
    source = channel_folder(str(tmp_path), 1)
    assert len(source) == 152
    np.testing.assert_array_equal(np.asarray(source.read(102))[:, :, 0], one + 2)


@pytest.mark.parametrize("form", ["png", "png16", "dcm", "npy", "tif"])
def test_what_is_too_large_is_refused_before_it_is_decoded(tmp_path, form, monkeypatch):
    """A few bytes may stand for gigabytes of pixels."""
    path = tmp_path / f"a.{form[:3]}"
    if form == "png":
        Image.fromarray(pixels_of("uint8", 3)).save(path)
    else:
        write(
            path,
            pixels_of("uint16", 1),
            form[:3],
            "png16" if form == "png16" else "last" if form == "npy" else "chunky",
        )

    def decoded(*arguments, **flags):
        raise AssertionError("decoded")

    for place, name in ((Image.Image, "load"), (pydicom.pixels, "pixel_array"), (imagecodecs, "png_decode")):
        monkeypatch.setattr(place, name, decoded)
    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", decoded)
    with pytest.raises(UnreadableChannels, match=rf"{WIDTH}x{HEIGHT} pixels refused, at most 1,000"):
        open_channels(str(path), 3 if form == "png" else 1, max_pixels=1000)


def test_a_channel_of_few_bright_spots_is_told_to_be_measured_otherwise(tmp_path):
    pixels = np.zeros((HEIGHT, WIDTH), np.uint16)
    pixels[0, :5] = 3000
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    with pytest.raises(InputError, match=r"found 0 for both in 1 images of values from 0 to 3000; add .* minmax"):
        measure(channel_folder(str(tmp_path), 1), "percentile")
    assert measure(channel_folder(str(tmp_path), 1), "minmax").channel_high == [3000.0]


def test_a_level_of_fewer_planes_is_left_out_of_a_pyramid(tmp_path):
    path = tmp_path / "volume.zarr"
    group = zarr.open_group(path, mode="w", zarr_format=2)
    values = np.arange(2 * 4, dtype="uint16").reshape(2, 1, 4, 1, 1)
    levels = {
        "0": np.broadcast_to(values, (2, 1, 4, 32, 32)),
        "1": np.broadcast_to(values[:, :, ::2], (2, 1, 2, 16, 16)),
    }
    levels["2"] = np.broadcast_to(values, (2, 1, 4, 8, 8))
    for name, one in levels.items():
        group.create_array(name, shape=one.shape, chunks=one.shape, dtype=one.dtype)[:] = one
    group.attrs["multiscales"] = [
        {"axes": [{"name": axis} for axis in "tczyx"], "datasets": [{"path": name} for name in levels]}
    ]
    file = open_channels(str(path), 1, "images", lazy=True)
    assert [file.size(level) for level in range(len(file.levels))] == [(32, 32), (8, 8)]
    for level in range(2):
        assert [int(file.read(image, level).max()) for image in range(file.num_images)] == list(range(8))


@pytest.mark.parametrize("dtype", ["bool", "int16"])
def test_white_is_zero_in_one_bit_and_signed_files_too(tmp_path, dtype):
    values = np.array([[0, 1], [1, 0]], dtype) if dtype == "bool" else np.array([[-32768, 32767], [5, -1]], dtype)
    tifffile.imwrite(tmp_path / "white.tif", values, photometric="miniswhite")
    found = open_channels(str(tmp_path / "white.tif"), 1).read()[:, :, 0]
    expected = ~values if dtype == "bool" else np.array([[32767, -32768], [-6, 0]])
    np.testing.assert_array_equal(found, expected)


def test_an_ome_zarr_with_other_pixels_is_another_image(tmp_path):
    """Shapes and metadata may be the same, and sizes too."""
    for seed in (0, 0, 1):
        write_zarr(
            tmp_path / f"{len(list(tmp_path.iterdir()))}.zarr",
            pixels_of("uint16", 2, seed).transpose(2, 0, 1),
            2,
            "cyx",
        )
    source = channel_folder(str(tmp_path), 2)
    digests = [source.digest(index) for index in range(3)]
    assert digests[0] == digests[1] != digests[2]
    write_zarr(tmp_path / "0.zarr", pixels_of("uint16", 2, 2).transpose(2, 0, 1), 2, "cyx")
    changed = channel_folder(str(tmp_path), 2)
    assert changed.digest(0) != digests[0]
    assert changed.fingerprint != source.fingerprint


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16", "RGB", "RGBA", "P"])
def test_a_picture_of_pillow_gives_the_pixels_of_its_file(tmp_path, mode):
    channels = 1 if mode in ("1", "L", "LA", "I;16") else 3
    values = pixels_of("uint8", 3)
    picture = (
        Image.fromarray(pixels_of("uint16", 1)[:, :, 0]) if mode == "I;16" else Image.fromarray(values).convert(mode)
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    processor = processor_of(channels, "uint8")
    with Image.open(tmp_path / "a.png") as opened:
        found = processor(opened, return_tensors="np")["pixel_values"]
    of_file = processor(str(tmp_path / "a.png"), return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(found, of_file, atol=1e-6)


def test_an_array_of_several_images_is_not_taken_for_one():
    with pytest.raises(ValueError, match=r"an array \[8, 32, 40\] of 8 images; give them as a list"):
        processor_of(1, "uint8")(np.zeros((8, 32, 40), "uint8"))


def test_white_that_is_zero_transparency_and_numbers_that_are_none(tmp_path):
    pixels = pixels_of("uint8", 1)
    tifffile.imwrite(tmp_path / "white.tif", pixels[:, :, 0], photometric="miniswhite")
    np.testing.assert_array_equal(open_channels(str(tmp_path / "white.tif"), 1).read(), 255 - pixels)
    colours = pixels_of("uint8", 4)
    Image.fromarray(colours).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(open_channels(str(tmp_path / "alpha.png"), 3).read(), colours[:, :, :3])
    np.testing.assert_array_equal(open_channels(str(tmp_path / "alpha.png"), 4).read(), colours)
    floats = pixels_of("float32", 2)
    floats[0, 0] = np.nan, np.inf
    np.save(tmp_path / "nan.npy", floats)
    assert open_channels(str(tmp_path / "nan.npy"), 2).read()[0, 0].tolist() == [0, 0]


def test_what_cannot_be_told_or_is_not_there_is_said(tmp_path, monkeypatch):
    np.save(tmp_path / "square.npy", np.zeros((5, 40, 5), np.uint8))
    zarr.open_group(tmp_path / "bare.zarr", mode="w").create_array("0", shape=(4, 4), dtype="u1")
    write_dicom(tmp_path / "empty.dcm", pixels_of("uint8", 1).transpose(2, 0, 1))
    data = pydicom.dcmread(tmp_path / "empty.dcm")
    del data.PixelData
    data.save_as(tmp_path / "empty.dcm")
    expected = {
        "square.npy": ("axes", "the order of axes .* cannot be told"),
        "bare.zarr": ("no multiscales", "a Zarr without `multiscales`"),
        "empty.dcm": ("no pixels", "a DICOM file without pixels"),
    }
    for name, (kind, message) in expected.items():
        with pytest.raises(UnreadableChannels, match=message) as caught:
            open_channels(str(tmp_path / name), 5)
        assert caught.value.kind == kind
    tifffile.imwrite(tmp_path / "a.tif", pixels_of("uint8", 1))

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(channel_layout.importlib, "import_module", missing)
    with pytest.raises(UnreadableChannels, match=r"needs the package tifffile.*pip install 'hf-vicreg\[science\]'"):
        open_channels(str(tmp_path / "a.tif"), 1)


def test_a_bad_file_among_good_ones_is_skipped_counted_and_explained(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(8):
        write_tiff(folder / f"{number}.tif", pixels_of("uint16", 5, number), "planar")
    write_tiff(folder / "bands.tif", pixels_of("uint16", 13), "chunky")
    (folder / "cut.tif").write_bytes((folder / "0.tif").read_bytes()[:3000])
    (folder / "none.npy").write_bytes(b"")
    done = pretrain(
        out=tmp_path / "run",
        data=folder,
        model=MODEL | {"num_channels": 5},
        vicreg={"expander_sizes": [16, 16]},
        batch_size=4,
        max_steps=8,
        device="cpu",
    )
    said = [json.loads(line) for line in (done.output_dir / "unusable.jsonl").read_text().splitlines()]
    assert {one["name"]: one["kind"] for one in said} == {
        "bands.tif": "channels",
        "cut.tif": "damaged",
        "none.npy": "empty",
    }
    reason = next(one["reason"] for one in said if one["name"] == "bands.tif")
    assert reason == "13 channel(s) where 5 are wanted; train with --model.num_channels 13"


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ({}, {}, "13 channels where 3 are wanted; --model.num_channels 13"),
        ({"num_channels": 13}, {"normalisation": "photo"}, "`normalisation`: expected percentile, minmax or fixed"),
        ({"num_channels": 13}, {"normalisation": "fixed 5 5"}, "expected fixed LOW HIGH with LOW below HIGH"),
        ({"num_channels": 13}, {"pages": "planes"}, "`pages`: expected 'channels' or 'images', got 'planes'"),
        ({"num_channels": 13}, {}, "expected values that differ in channel 4 of bands, found 7"),
    ],
)
def test_what_a_run_cannot_be_made_of_is_said_in_one_line(tmp_path, model, flags, message):
    folder = tmp_path / "bands"
    folder.mkdir()
    pixels = pixels_of("uint16", 13)
    pixels[:, :, 4] = 7
    write_tiff(folder / "a.tif", pixels, "chunky")
    with pytest.raises(InputError) as caught:
        pretrain(
            out=tmp_path / "run",
            data=folder,
            model=MODEL | model,
            vicreg={"expander_sizes": [16, 16]},
            batch_size=2,
            max_steps=1,
            device="cpu",
            **flags,
        )
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_photographs_are_read_as_before_unless_asked(tmp_path):
    Image.fromarray(pixels_of("uint8", 3)).save(tmp_path / "a.png")
    np.save(tmp_path / "labels.npy", np.zeros(3))  # no image to those who train on photographs
    source = load_sources(train_dir=str(tmp_path))[0]
    assert list(source.file_names) == ["a.png"]
    assert isinstance(source.read(0), Image.Image)


def test_a_folder_of_files_that_are_no_photographs_is_told_how_to_be_read(tmp_path, capsys):
    np.save(tmp_path / "a.npy", pixels_of("uint16", 2))
    np.save(tmp_path / "b.npy", pixels_of("uint16", 5))
    with pytest.raises(InputError, match=r"found .npy below .*--model.num_channels N"):
        load_sources(train_dir=str(tmp_path))
    assert not main(["inspect", "images", str(tmp_path), "--num_channels", "2"])
    said = capsys.readouterr().out
    assert "1 2 x uint16" in said
    assert "1 NPY" in said
    assert "b.npy: 5 channel(s) where 2 are wanted" in said
