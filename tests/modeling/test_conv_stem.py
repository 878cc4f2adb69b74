"""The patch embedding by convolutions: against a plain loop, in every model, and where it does not go."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel

from hf_vicreg import BigBirdViTConfig, BigBirdViTForMaskedImageModeling, BigBirdViTModel
from hf_vicreg.modeling.configuration_bigbird_mae import BigBirdViTMAEConfig
from hf_vicreg.modeling.conv_stem import BigBirdViTConvStem


def make_config(**changes):
    settings = {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 32,
        "patch_size": 8,
        "tile_size": 2,
        "initializer_range": 0.3,
        "patch_embedding": "conv",
    }
    return BigBirdViTConfig(**settings | changes)


def plain(stem, image, patch):
    """One image, layer by layer, channels first: `(channels, height, width)` to `(hidden, rows, columns)`."""
    height, width = (side - side % patch for side in image.shape[-2:])
    states = image[:, :height, :width]
    for convolution, norm in zip(stem.convolutions, stem.norms, strict=True):
        states = F.conv2d(F.pad(states, (1, 1, 1, 1))[None], convolution.weight, stride=2)[0]
        centred = states - states.mean(0)
        scaled = centred / (centred.square().mean(0) + norm.eps).sqrt()
        states = F.gelu(scaled * norm.weight[:, None, None] + norm.bias[:, None, None])
    return torch.einsum("oc,chw->ohw", stem.projection.weight, states) + stem.projection.bias[:, None, None]


@pytest.mark.parametrize(("size", "patch"), [((32, 32), 8), ((27, 41), 4), ((18, 9), 2), ((70, 33), 16)])
def test_it_equals_a_plain_loop_in_outputs_and_gradients(size, patch):
    torch.manual_seed(0)
    stem = BigBirdViTConvStem(make_config(patch_size=patch, num_channels=5)).double()
    with torch.no_grad():
        for parameter in stem.parameters():
            parameter.uniform_(-0.5, 0.5)
    images = torch.randn(3, 5, *size, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 24, size[0] // patch, size[1] // patch, dtype=torch.float64)
    inputs = [images, *stem.parameters()]
    found = stem(images)
    expected = torch.stack([plain(stem, image, patch) for image in images])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    pairs = (torch.autograd.grad((one * weights).sum(), inputs, retain_graph=True) for one in (found, expected))
    for of_stem, of_loop in zip(*pairs, strict=True):
        torch.testing.assert_close(of_stem, of_loop, rtol=1e-9, atol=1e-9)


def test_each_layer_halves_the_image_and_doubles_the_channels():
    stem = BigBirdViTConvStem(make_config(patch_size=16, hidden_size=64, num_attention_heads=4))
    assert [tuple(one.weight.shape[:2]) for one in stem.convolutions] == [(8, 3), (16, 8), (32, 16), (64, 32)]


def test_a_saved_model_is_loaded_with_its_convolutions(tmp_path):
    torch.manual_seed(0)
    model = BigBirdViTModel(make_config()).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 40)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded.embeddings.projection, BigBirdViTConvStem)
    torch.testing.assert_close(loaded(images).pooler_output, model(images).pooler_output, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 6}, "`patch_size`: expected a power of two"),
        ({"patch_size": [8, 4]}, "`patch_size`: expected a power of two"),
        ({"patch_size": 1}, "`patch_size`: expected a power of two"),
        ({"patch_stride": 4}, "`patch_stride`: expected `patch_size`"),
        ({"patch_embedding": "resnet"}, "patch_embedding"),
    ],
)
def test_patches_that_no_halving_gives_are_refused(changes, message):
    with pytest.raises(Exception, match=message):
        make_config(**changes)


def test_masked_images_are_refused():
    model = BigBirdViTForMaskedImageModeling(make_config())
    with pytest.raises(ValueError, match='`patch_embedding`: expected "linear" for masked images'):
        model(torch.randn(1, 3, 32, 32), bool_masked_pos=torch.zeros(1, 16, dtype=torch.bool))
    with pytest.raises(Exception, match='`patch_embedding`: expected "linear" for masked images'):
        BigBirdViTMAEConfig(encoder=make_config().to_dict())
