"""Cosine similarities without rounding: the same bits on any processor, in any order of summation.

A sum of floats depends on the order of its terms, and the order on the instruction set, on the number of threads and
on the shape of the product. Two images that are almost as close to a third then change places from one machine to
another. Rounding the sums does not help, it only moves the edge. Here no sum is rounded at all:

1. A feature vector x is scaled by a power of two and rounded to whole numbers of 24 bits, as many as float32 has
   (fewer from 2^15 features on). The sum of their squares is taken in int64.
2. u = x / |x| is rounded to multiples of 2^-25. Square root and division are exact to the last bit by IEEE 754.
3. A product of two such numbers is a multiple of 2^-50, and by Cauchy and Schwarz no part of the sum of a dot product
   exceeds |u| |v|, which is about 1. float64 holds every multiple of 2^-50 up to 8, so each partial sum is exact.

The cosines are those of vectors at most 2^-26 off in each coordinate, which is the precision of float32.
"""

from collections.abc import Iterator

import torch

GRID = 2.0**25
SIGNIFICANT_BITS = 24
ELEMENTS = 2**22  # of a chunk of cosines: 32 MiB in float64


def exact_cosines(bank: torch.Tensor, queries: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield which queries, and their cosines `(some queries, bank images)` float64, as many as memory is spent on.

    Args:
        bank: `(images, features)`.
        queries: `(queries, features)`.
    """
    bank = on_grid(bank).T
    rows = max(1, ELEMENTS // max(1, bank.shape[1]))
    for start in range(0, len(queries), rows):
        some = slice(start, min(start + rows, len(queries)))
        yield some, on_grid(queries[some]) @ bank


def on_grid(features: torch.Tensor) -> torch.Tensor:
    """Return unit vectors `(images, features)` float64 whose coordinates are multiples of 2^-25; 0 stays 0.

    What is not finite counts as 0: a model that has diverged is near to nothing.

    Args:
        features: `(images, features)`.
    """
    found = torch.empty(features.shape, dtype=torch.float64, device=features.device)
    # some rows at a time: each of the steps below makes a copy
    rows = max(1, ELEMENTS // max(1, features.shape[1]))
    for some, into in zip(features.split(rows), found.split(rows), strict=True):
        into.copy_(_on_grid(some))
    return found


def _on_grid(features: torch.Tensor) -> torch.Tensor:
    features = features.double().nan_to_num(0.0, 0.0, 0.0)
    width = max(1, features.shape[1])
    bits = min(SIGNIFICANT_BITS, (62 - (width - 1).bit_length()) // 2)  # the sum of squares stays below 2^63
    largest = features.abs().amax(1, keepdim=True) if features.numel() else features.new_ones(len(features), 1)
    largest = torch.where(largest > 0, largest, 1.0)
    power_of_two = largest / torch.frexp(largest).mantissa  # exact, which torch.ldexp and torch.exp2 need not be
    whole = (features / power_of_two * 2.0**bits).round()
    length = whole.long().square().sum(1, keepdim=True).double().sqrt()
    return (whole / length.clamp_min(1) * GRID).round() / GRID
