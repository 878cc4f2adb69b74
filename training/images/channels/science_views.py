"""Augmentation of measured images: what differs between exposures, stainings and detectors, by channel.

Parameters are drawn with the crop, from its key, and follow the colours' in one row; the operations run batched on the
device. On values v in [0, 1], in this order: stain jitter, `v ** gamma * gain + offset` kept within [0, 1] (exposure,
background, and so a medical image's window and level), the colours' own, noise, and, after the normalisation, dropout.
"""

import math
import random

import torch

from hf_vicreg.training.run.arguments import ViewsConfig

NUM_COLOURS = 7  # parameters of the colours, before these
# Optical densities of red, green and blue of haematoxylin, eosin and DAB. Source: Ruifrok and Johnston 2001,
# "Quantification of histochemical staining by color deconvolution".
STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
LEAST = 1e-6  # of the light that comes through
MASK = 2**32 - 1


def is_measured(config: ViewsConfig) -> bool:
    """Return whether the views have operations of this module."""
    names = ("gain", "offset", "gamma", "noise", "channel_dropout_probability", "stain")
    return any(getattr(config, name) for name in names)


def draw_measured(config: ViewsConfig, channels: int, rng: random.Random) -> list[float]:
    """Return the parameters of one view: noise and its seed; gains, offsets, exponents and what is kept by channel.

    With stain jitter six more follow: a factor and a summand for each stain.
    """
    noise, seed = rng.uniform(0, config.noise), float(rng.getrandbits(24))  # exact in float32
    gains = [1 + rng.uniform(-config.gain, config.gain) for _ in range(channels)]
    offsets = [rng.uniform(-config.offset, config.offset) for _ in range(channels)]
    widest = math.log(1 + config.gamma)
    exponents = [math.exp(rng.uniform(-widest, widest)) for _ in range(channels)]
    kept = [float(rng.random() >= config.channel_dropout_probability) for _ in range(channels)]
    if not any(kept):
        kept[rng.randrange(channels)] = 1.0
    stains = []
    if config.stain:
        factors = [1 + rng.uniform(-config.stain, config.stain) for _ in STAINS]
        stains = factors + [rng.uniform(-config.stain, config.stain) for _ in STAINS]
    return [noise, seed, *gains, *offsets, *exponents, *kept, *stains]


def before_colours(images: torch.Tensor, drawn: torch.Tensor) -> None:
    """Run stain jitter, gamma, gain and offset in place.

    Args:
        images: `(batch, channels, height, width)` in [0, 1].
        drawn: `(batch, parameters)`, of `draw_measured`.
    """
    channels = images.shape[1]
    by_channel = drawn[:, 2 : 2 + 3 * channels].to(images.device).unflatten(1, (3, channels, 1, 1))
    stains = drawn[:, 2 + 4 * channels :]
    if stains.shape[1]:
        images.copy_(jitter_stains(images, stains[:, :3], stains[:, 3:]))
    gains, offsets, exponents = by_channel.unbind(1)
    if bool((drawn[:, 2 + 2 * channels : 2 + 3 * channels] != 1).any()):
        images.pow_(exponents)
    images.mul_(gains).add_(offsets).clamp_(0, 1)


def add_noise(images: torch.Tensor, drawn: torch.Tensor) -> None:
    """Add normal noise in place, `drawn[:, 0]` its deviation and `drawn[:, 1]` its seed, and keep [0, 1]."""
    if bool((drawn[:, 0] > 0).any()):
        sigmas = drawn[:, 0].to(images.device)[:, None, None, None]
        images.add_(normal_like(images, drawn[:, 1]).mul_(sigmas)).clamp_(0, 1)


def drop_channels(images: torch.Tensor, drawn: torch.Tensor) -> None:
    """Set the channels that are dropped to 0 in place: of normalised images that is their mean."""
    channels = images.shape[1]
    kept = drawn[:, 2 + 3 * channels : 2 + 4 * channels]
    if bool((kept != 1).any()):
        images.mul_(kept.to(images.device)[:, :, None, None])


def jitter_stains(images: torch.Tensor, factors: torch.Tensor, summands: torch.Tensor) -> torch.Tensor:
    """Return RGB images whose stains have other amounts: `amount * factor + summand` in optical density.

    Densities are `-ln(v)`, amounts what of `STAINS` they are made of. Source: Tellez et al. 2018 (arXiv 1808.05896),
    section III-B. Deviation: negative amounts are kept, so that factors of 1 and summands of 0 change nothing.

    Args:
        images: `(batch, 3, height, width)` in [0, 1].
        factors: `(batch, 3)`, of haematoxylin, eosin and DAB.
        summands: `(batch, 3)`, the same.
    """
    stains = torch.tensor(STAINS, dtype=torch.float64)
    stains = stains / stains.norm(dim=1, keepdim=True)
    density = images.clamp(min=LEAST).log().neg_()
    # amounts = density @ inverse, new density = (amounts * factor + summand) @ stains: one 3x3 matrix an image
    inverse = torch.linalg.inv(stains)
    change = torch.einsum("ps,bs,sq->bqp", inverse, factors.double().cpu(), stains).float().to(images.device)
    shift = (summands.double().cpu() @ stains).float().to(images.device)[:, :, None, None]
    # term by term: a batched product may hang on the size of the batch
    terms = [change[:, :, stain, None, None] * density[:, stain : stain + 1] for stain in range(3)]
    return (terms[0] + terms[1]).add_(terms[2]).add_(shift).neg_().exp_().clamp_(0, 1)


def normal_like(images: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """Return standard normal numbers of the images' shape, a function of each image's seed on any device.

    Box and Muller's transform of two halves of a hash (MurmurHash3's finaliser) of seed and place.
    """
    place = torch.arange(images[0].numel(), device=images.device, dtype=torch.int64)
    hashed = seeds.to(torch.int64).to(images.device)[:, None] * 0x9E3779B1 + place * 0x85EBCA6B
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        hashed &= MASK
        hashed ^= hashed >> shift
        hashed *= factor
    first, second = ((hashed >> 16 & 0xFFFF) + 1).float() / 65537, (hashed & 0xFFFF).float() / 65536
    return (first.log_().mul_(-2).sqrt_() * second.mul_(2 * math.pi).cos_()).view_as(images)
