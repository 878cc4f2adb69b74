"""Learned positions, resampled: torch's own interpolation is the oracle, image by image."""

import pytest
import torch
import torch.nn.functional as F

from hf_vicreg.modeling.bigbird_positions import resampled_positions

SIZES = [(7, 5), (7, 13), (3, 2), (14, 4), (1, 1), (20, 31), (5, 7)]


def interpolated(table, rows, columns, antialias):
    image = table.permute(2, 0, 1)[None]
    image = F.interpolate(image, size=(rows, columns), mode="bicubic", antialias=antialias)
    return image[0].permute(1, 2, 0)


@pytest.mark.parametrize("antialias", [False, True], ids=["plain", "antialias"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_whole_and_padded_images_equal_torch(size, antialias):
    table = torch.randn(7, 5, 6, dtype=torch.float64, requires_grad=True)
    expected = interpolated(table, *size, antialias)
    whole = resampled_positions(table, None, *size, antialias).view(*size, 6)
    torch.testing.assert_close(whole, expected)

    # each image of a padded batch has its own: one at the left below, one over all, one of padding alone
    rows, columns = size[0] + 3, size[1] + 2
    valid = torch.zeros(3, rows, columns, dtype=torch.bool)
    valid[0, 3:, :-2] = True
    valid[1] = True
    padded = resampled_positions(table, valid, rows, columns, antialias).view(3, rows, columns, 6)
    torch.testing.assert_close(padded[0, 3:, :-2], expected)
    torch.testing.assert_close(padded[1], interpolated(table, rows, columns, antialias))
    assert padded.isfinite().all()

    weight = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), table)
    (found,) = torch.autograd.grad((padded[0, 3:, :-2] * weight).sum(), table)
    torch.testing.assert_close(found, wanted)


def test_native_grid_is_the_table_itself():
    table = torch.randn(7, 5, 6)
    assert torch.equal(resampled_positions(table, None, 7, 5, False)[0], table.flatten(0, 1))


def test_autocast_and_halves_are_summed_in_float():
    table = torch.randn(7, 5, 6)
    valid = torch.ones(1, 9, 9, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        found = [resampled_positions(table, one, 9, 9, False) for one in (valid, None)]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    found = resampled_positions(table.half(), None, 3, 4, True)
    assert found.dtype == torch.float16
    expected = interpolated(table.half().float(), 3, 4, True).half()
    assert torch.equal(found.view(3, 4, 6), expected)
