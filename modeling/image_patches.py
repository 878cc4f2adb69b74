"""Images as patches and back, and the loss of patches that were masked: what decoders of masked images share.

A patch is `(patch height * patch width * channels,)`, channels last. Pixels at the lower and right border that fill no
whole patch are left out, as the encoder leaves them out.
"""

import torch

NORM_EPS = 1e-6


def patchify(pixel_values: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
    """Return `(batch, patches, pixels of a patch)`, in raster order, of images `(batch, channels, height, width)`."""
    (height, width), (batch, channels) = patch_size, pixel_values.shape[:2]
    rows, columns = pixel_values.shape[2] // height, pixel_values.shape[3] // width
    whole = pixel_values[:, :, : rows * height, : columns * width]
    split = whole.reshape(batch, channels, rows, height, columns, width)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, height * width * channels)


def unpatchify(patches: torch.Tensor, grid: tuple[int, int], patch_size: tuple[int, int]) -> torch.Tensor:
    """Return images `(batch, channels, rows * patch height, columns * patch width)` of `patchify`'s patches."""
    (rows, columns), (height, width) = grid, patch_size
    split = patches.reshape(len(patches), rows, columns, height, width, -1)
    return split.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, rows * height, columns * width)


def patch_statistics(patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation `(batch, patches, 1)` of each patch's pixels.

    Source: He et al. 2021, MAE (arXiv 2111.06377), section 4.1, "reconstruction target"; variance and epsilon as in
    the authors' code: that of a sample, and 1e-6 below the root.
    """
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + NORM_EPS).sqrt()


def masked_means(errors: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Return each image's mean over its masked patches, `(batch,)`, whose mean is the loss.

    Where all images have as many masked patches the loss is the mean over all masked patches, as SimMIM's and MAE's
    authors take it (SimMIM's add 1e-5 to the number of pixels). Image by image, since then the losses of processes
    with equal shares of a batch average to that of the batch.

    Args:
        errors: `(batch, patches)`, in at least fp32.
        masked: `(batch, patches)` bool; an image without a masked patch adds 0.
    """
    weights = masked.to(errors.dtype)
    return (errors * weights).sum(1) / weights.sum(1).clamp(min=1)


__all__ = ["masked_means", "patch_statistics", "patchify", "unpatchify"]
