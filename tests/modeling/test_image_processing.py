"""Both backends give the same pixels, and the automatic class finds them."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from hf_vicreg import BigBirdViTConfig, BigBirdViTImageProcessor, BigBirdViTImageProcessorPil
from hf_vicreg.training.images.decoding import decode


def picture(height=40, width=30, mode="RGB"):
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 4, columns * 5, rows + columns], axis=-1) % 256
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_backends_agree(mode):
    size = {"height": 32, "width": 24}
    fast = BigBirdViTImageProcessor(size=size)(picture(mode=mode), return_tensors="pt")["pixel_values"]
    slow = BigBirdViTImageProcessorPil(size=size)(picture(mode=mode), return_tensors="pt")["pixel_values"]
    assert fast.shape == slow.shape == (1, 3, 32, 24)
    # resizing rounds to uint8 in both, not always alike: two grey levels, normalised
    assert (fast - slow).abs().max() < 2.5 / 255 / min(IMAGENET_DEFAULT_STD)


def test_pixels_are_scaled_and_normalised():
    image = picture(32, 32)
    found = BigBirdViTImageProcessor(size={"height": 32, "width": 32})([image], return_tensors="pt")["pixel_values"][0]
    expected = torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255
    expected = (expected - torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None]) / torch.tensor(IMAGENET_DEFAULT_STD)[
        :, None, None
    ]
    torch.testing.assert_close(found, expected)


def test_auto_class_finds_either_backend(tmp_path):
    BigBirdViTConfig().save_pretrained(tmp_path)
    BigBirdViTImageProcessor(size={"height": 48, "width": 64}).save_pretrained(tmp_path)
    fast = AutoImageProcessor.from_pretrained(tmp_path)
    slow = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(fast) is BigBirdViTImageProcessor
    assert type(slow) is BigBirdViTImageProcessorPil
    assert dict(fast.size) == dict(slow.size) == {"height": 48, "width": 64}


def files():
    """Image files of kinds that are easily read in two ways, by name."""
    rgb, grey = picture(), picture(mode="L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    transparent = picture(mode="RGBA")
    transparent.putalpha(grey)
    grey_alpha = grey.convert("LA")
    grey_alpha.putalpha(grey)
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds = {
        "grey.png": (grey, "PNG", {}),
        "bilevel.png": (picture(mode="1"), "PNG", {}),
        "palette.png": (rgb.quantize(64), "PNG", {}),
        "palette_transparent.png": (rgb.quantize(64), "PNG", {"transparency": bytes(range(0, 256, 4))}),
        "rgb_transparent.png": (rgb, "PNG", {"transparency": (4, 5, 2)}),
        "rgba.png": (transparent, "PNG", {}),
        "grey_alpha.png": (grey_alpha, "PNG", {}),
        "cmyk.jpg": (picture(mode="CMYK"), "JPEG", {}),
        "grey16.png": (deep, "PNG", {}),
        "grey16.tiff": (deep, "TIFF", {}),
        "grey32.tiff": (Image.fromarray(np.asarray(deep).astype(np.int32)), "TIFF", {}),
        "turned.jpg": (rgb, "JPEG", {"exif": turned}),
        "turned16.png": (deep, "PNG", {"exif": turned}),
    }
    found = {}
    for name, (image, form, options) in kinds.items():
        buffer = BytesIO()
        image.save(buffer, form, **options)
        found[name] = buffer.getvalue()
    return found


@pytest.mark.parametrize("processor_class", [BigBirdViTImageProcessor, BigBirdViTImageProcessorPil])
@pytest.mark.parametrize("name", files())
def test_every_kind_of_file_gets_the_pixels_of_training(tmp_path, name, processor_class):
    content = files()[name]
    (tmp_path / name).write_bytes(content)
    processor = processor_class(size={"height": 24, "width": 32})
    trained = processor(decode(content), return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(Image.open(BytesIO(content)), return_tensors="pt")["pixel_values"], trained)
    # with no processor between: what `decode` gives is what is shown
    shown = np.asarray(decode(content)).astype(int)
    assert shown.shape == ((30, 40, 3) if name.startswith("turned") else (40, 30, 3))
    if "16" in name or "32" in name:
        expected = np.asarray(picture(mode="L")).astype(int)
        assert np.array_equal(shown[..., 0], np.rot90(expected, -1) if "turned" in name else expected)
    assert torch.equal(processor([str(tmp_path / name)], return_tensors="pt")["pixel_values"], trained)


@pytest.mark.parametrize("processor_class", [BigBirdViTImageProcessor, BigBirdViTImageProcessorPil])
def test_float_images_are_refused_not_clipped(processor_class):
    with pytest.raises(ValueError, match=r"`images`: expected pixels of a known range, got a float image"):
        processor_class()(Image.fromarray(np.ones((40, 40), np.float32)))


def test_processors_saved_before_the_conversion_load(tmp_path):
    BigBirdViTConfig().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"do_convert_rgb": true, "do_normalize": true, "do_rescale": true, "do_resize": true, "resample": 3, '
        '"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], '
        '"rescale_factor": 0.00392156862745098, '
        '"image_processor_type": "BigBirdViTImageProcessor", "size": {"height": 24, "width": 32}}'
    )
    found = AutoImageProcessor.from_pretrained(tmp_path)(picture(), return_tensors="pt")["pixel_values"]
    fresh = BigBirdViTImageProcessor(size={"height": 24, "width": 32})(picture(), return_tensors="pt")["pixel_values"]
    assert torch.equal(found, fresh)
