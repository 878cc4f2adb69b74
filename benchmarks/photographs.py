"""Synthetic photographs for benchmarks: JPEGs with the statistics that decoding and resizing depend on."""

from pathlib import Path

import numpy as np
from PIL import Image

QUALITY = 90


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Return a picture whose amplitudes fall as one over the frequency, with occluding shapes and soft colours.

    Source: Field 1987, Relations between the statistics of natural images and the response properties of cortical
    cells; the dead leaves of Lee, Mumford, Huang 2001 stand for its edges.
    """
    across, down = np.fft.rfftfreq(width)[None], np.fft.fftfreq(height)[:, None]
    amplitude = 1 / np.maximum(np.hypot(across, down), 1 / max(width, height))

    def field() -> np.ndarray:
        phases = rng.normal(size=amplitude.shape) + 1j * rng.normal(size=amplitude.shape)
        drawn = np.fft.irfft2(phases * amplitude, (height, width))
        return drawn / drawn.std()

    luma, warm, green = field(), field(), field()
    for _ in range(12):
        luma = np.where(field() > 1.2, luma / 2 + rng.normal(), luma)
    pixels = np.stack([luma + 0.3 * warm, luma - 0.1 * warm + 0.15 * green, luma - 0.3 * green], -1)
    return Image.fromarray((45 * pixels + 118).clip(0, 255).astype(np.uint8))


def write_photographs(folder: Path, count: int, width: int, height: int, seed: int = 0) -> float:
    """Fill a new folder with JPEGs; return their mean size in bytes."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        photograph(rng, width, height).save(folder / f"{index:05d}.jpg", quality=QUALITY)
    return sum(path.stat().st_size for path in folder.iterdir()) / count
