"""DICOM: values as the standard says them, of single files and of many frames, compressed or not."""

import imagecodecs
import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder

from hf_vicreg.modeling.channel_files import open_channels
from hf_vicreg.modeling.channel_layout import UnreadableChannels
from hf_vicreg.training.images.channels.folders import channel_folder
from hf_vicreg.training.images.channels.measuring import measure
from tests.training.images.test_channel_files import HEIGHT, WIDTH, pixels_of, write_dicom


def test_dicom_values_are_as_the_standard_says(tmp_path):
    stored = pixels_of("int16", 1).transpose(2, 0, 1)
    path = tmp_path / "a.dcm"
    write_dicom(path, stored, Modality="CT", RescaleSlope=2, RescaleIntercept=-1024, RescaleType="HU", WindowWidth=80)
    np.testing.assert_allclose(open_channels(str(path), 1).read()[:, :, 0], stored[0] * 2.0 - 1024)
    unsigned = pixels_of("uint16", 1).transpose(2, 0, 1)
    write_dicom(path, unsigned, Modality="DX", WindowCenter=2000, WindowWidth=1000)
    windowed = pydicom.pixels.apply_windowing(unsigned[0], pydicom.dcmread(path))
    found = open_channels(str(path), 1).read()[:, :, 0]
    np.testing.assert_allclose(found, windowed, rtol=1e-6)
    assert (found.min(), found.max()) == (0, 65535)  # as a file without a window has them
    white = {"Modality": "DX", "WindowCenter": [2000, 7], "WindowWidth": [1000, 7], "VOILUTFunction": "SIGMOID"}
    write_dicom(path, unsigned, PhotometricInterpretation="MONOCHROME1", RescaleSlope=2, RescaleIntercept=5, **white)
    windowed = 65535 / (1 + np.exp(-4 * (unsigned[0] * 2.0 + 5 - 2000) / 1000)) * 2 + 5
    found = open_channels(str(path), 1).read()[:, :, 0]
    np.testing.assert_allclose(found, 2 * 5 + 2 * 65535 - windowed, rtol=1e-5, atol=0.01)
    write_dicom(path, unsigned, Modality="DX", PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(open_channels(str(path), 1).read()[:, :, 0], 65535 - unsigned[0])


def test_values_of_a_multi_frame_dicom_are_those_of_each_frame(tmp_path):
    """Enhanced files say it by frame, or once for all of them, and not at the top."""

    def rescaling(slope, intercept, unit="HU"):
        part = pydicom.Dataset()
        part.RescaleSlope, part.RescaleIntercept, part.RescaleType = slope, intercept, unit
        groups = pydicom.Dataset()
        groups.PixelValueTransformationSequence = [part]
        return groups

    stored, path = pixels_of("int16", 3).transpose(2, 0, 1), tmp_path / "enhanced.dcm"
    write_dicom(path, stored, Modality="CT", SharedFunctionalGroupsSequence=[rescaling(2, -1024)])
    expected = stored.transpose(1, 2, 0) * 2.0 - 1024
    np.testing.assert_allclose(open_channels(str(path), 3).read(), expected)
    each = [rescaling(1, 10), rescaling(1, 20), pydicom.Dataset()]
    shared = rescaling(2, -1024)
    write_dicom(path, stored, PerFrameFunctionalGroupsSequence=each, SharedFunctionalGroupsSequence=[shared])
    found = open_channels(str(path), 3).read()
    np.testing.assert_allclose(found[:, :, :2], stored.transpose(1, 2, 0)[:, :, :2] + np.array([10, 20]))
    np.testing.assert_allclose(found[:, :, 2], expected[:, :, 2])
    window = pydicom.Dataset()
    window.WindowCenter, window.WindowWidth = 100, 201
    groups = rescaling(1, 0, "US")
    groups.FrameVOILUTSequence = [window]
    write_dicom(path, stored[:1], Modality="US", SharedFunctionalGroupsSequence=[groups])
    expected = ((stored[0] - 99.5) / 200 + 0.5).clip(0, 1) * 65535 - 32768
    np.testing.assert_allclose(open_channels(str(path), 1).read()[:, :, 0], expected, rtol=1e-6, atol=0.01)


def test_empty_tags_of_a_dicom_say_nothing(tmp_path):
    stored, path = pixels_of("uint16", 1).transpose(2, 0, 1), tmp_path / "empty.dcm"
    write_dicom(path, stored, Modality="DX", RescaleSlope=None, RescaleIntercept=None, RescaleType="")
    np.testing.assert_array_equal(open_channels(str(path), 1).read()[:, :, 0], stored[0])
    write_dicom(path, stored, Modality="DX", RescaleType="", WindowCenter=2000, WindowWidth=1000)
    assert open_channels(str(path), 1).read().max() == 65535 > stored.max()


def test_compressed_dicom_is_read_or_says_what_it_needs(tmp_path, monkeypatch):
    stored, path = pixels_of("uint16", 2).transpose(2, 0, 1), tmp_path / "lossless.dcm"
    write_dicom(path, stored)
    data = pydicom.dcmread(path)
    data.PixelData = encapsulate([imagecodecs.ljpeg_encode(one, bitspersample=16) for one in stored])
    data["PixelData"].is_undefined_length = True
    for syntax in (pydicom.uid.JPEGLosslessSV1, pydicom.uid.HTJ2KLossless, pydicom.uid.MPEG2MPML):
        data.file_meta.TransferSyntaxUID = syntax
        data.save_as(tmp_path / f"{syntax.keyword}.dcm")
    found = open_channels(str(tmp_path / "JPEGLosslessSV1.dcm"), 2).read()
    np.testing.assert_array_equal(found, stored.transpose(1, 2, 0))
    monkeypatch.setattr(
        get_decoder(pydicom.uid.HTJ2KLossless), "_available", {}
    )  # as where its packages are not installed
    with pytest.raises(UnreadableChannels, match=r"needs one of: .*pylibjpeg-openjpeg") as refusal:
        open_channels(str(tmp_path / "HTJ2KLossless.dcm"), 2)
    assert refusal.value.kind == "library"
    with pytest.raises(UnreadableChannels, match="compressed as MPEG2"):
        open_channels(str(tmp_path / "MPEG2MPML.dcm"), 2)


def test_padding_of_a_dicom_is_left_out_of_the_range(tmp_path):
    stored = np.full((1, HEIGHT, WIDTH), -2000, np.int16)
    stored[0, 5:30, 5:30] = np.linspace(0, 1000, 625).reshape(25, 25)
    tags = {"Modality": "CT", "RescaleSlope": 1, "RescaleIntercept": -24, "PixelPaddingValue": -2000}
    write_dicom(tmp_path / "a.dcm", stored, **tags)
    assert np.isnan(open_channels(str(tmp_path / "a.dcm"), 1).read(gaps=True)).mean() == 1 - 625 / (HEIGHT * WIDTH)
    found = measure(channel_folder(str(tmp_path), 1), "minmax")
    assert (found.channel_low, found.channel_high) == ([-24.0], [976.0])
