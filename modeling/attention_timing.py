"""Which form of attention is the fastest here: each that is legal, timed forward and backward.

`sdpa` chooses by a rule that was measured on CPUs. What is best on another device, of another type or at another batch
is best found by trying: `fastest_forms` does, and `use_forms` has a model take them. All forms compute the same
numbers but for rounding; one that does not, or that fails, is left out with a warning.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from transformers.utils import logging

from .bigbird_attention import legal_forms, sdpa_attention
from .bigbird_blocks import BigBirdViTAttention
from .bigbird_pattern import BlockPattern
from .modeling_bigbird_vit import BigBirdViTModel

logger = logging.get_logger(__name__)

SECONDS = 0.5  # of each form at least, after a first call that may compile
CALLS = 3
# a dense score matrix this large is never the fastest where blocks are legal, and may not fit
MOST_DENSE_TOKENS = 16_384
# relative difference of outputs, by type: of other orders of summation
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class _Layer(torch.nn.Module):
    """Stands for an attention layer in training that takes one form."""

    def __init__(self, grid: tuple[int, int], form: str):
        super().__init__()
        self.attention_forms = {grid: form}


def time_forms(
    encoder: BigBirdViTModel, height: int, width: int, images: int, dtype: torch.dtype, seconds: float = SECONDS
) -> dict[str, float]:
    """Return the seconds of one layer's attention core, forward and backward, by form: the median over several calls.

    Args:
        encoder: On the device where it will run.
        height: Of the images, in pixels.
        width: Likewise.
        images: That go through the encoder at once.
        dtype: Of queries, keys and values: that of autocast, where there is one.
        seconds: How long each form is tried, after its first call.

    Raises:
        ValueError: The image is smaller than one patch.
    """
    config, device = encoder.config, encoder.device
    pattern = encoder.attention_pattern(height, width)
    shape = images, config.num_attention_heads, pattern.num_tokens, config.head_dim
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # nobody else's numbers change
        return _timed(encoder, pattern, shape, dtype, seconds)


def _timed(
    encoder: BigBirdViTModel, pattern: BlockPattern, shape: tuple[int, ...], dtype: torch.dtype, seconds: float
) -> dict[str, float]:
    config, device = encoder.config, encoder.device
    found: dict[str, float] = {}
    expected: torch.Tensor | None = None
    dropout = config.attention_probs_dropout_prob
    for form in legal_forms(device.type, dropout):
        if form == "dense" and not pattern.is_full and pattern.num_tokens > MOST_DENSE_TOKENS:
            continue
        layer = _Layer(pattern.grid, form)
        attend = partial(sdpa_attention, layer, pattern=pattern, scaling=config.head_dim**-0.5, dropout=dropout)
        try:
            torch.manual_seed(0)
            inputs = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
            output = _call(attend, inputs).detach()
            if expected is not None and dropout == 0:
                difference = torch.linalg.vector_norm((output - expected).float())
                if not difference <= TOLERANCES[dtype] * torch.linalg.vector_norm(expected.float()):
                    logger.warning("attention by form %r gives other numbers here, and is left out", form)
                    continue
            expected = output if expected is None else expected
            found[form] = _median_seconds(partial(_call, attend, inputs), device, seconds)
        except Exception as error:  # whatever a compiler or a full device says: the others are still there
            logger.warning("attention by form %r fails here, and is left out: %s", form, str(error).split("\n")[0])
    return found


def fastest_forms(
    encoder: BigBirdViTModel, sizes: Mapping[tuple[int, int], int], dtype: torch.dtype
) -> dict[tuple[int, int], str]:
    """Return the fastest form by grid.

    Args:
        encoder: As for `time_forms`.
        sizes: By (height, width) in pixels, how many images go through the encoder at once.
        dtype: As for `time_forms`.
    """
    forms = {}
    for (height, width), images in sizes.items():
        timed = time_forms(encoder, height, width, images, dtype)
        if timed:
            forms[encoder.config.grid_size(height, width)] = min(timed, key=timed.__getitem__)
    return forms


def use_forms(encoder: torch.nn.Module, forms: Mapping[tuple[int, int], str]) -> None:
    """Let all attention layers take these forms, by grid; in place. An empty mapping restores the rule."""
    for module in encoder.modules():
        if isinstance(module, BigBirdViTAttention):
            module.attention_forms = dict(forms)


def _call(attend: Callable[..., tuple[torch.Tensor, None]], inputs: list[torch.Tensor]) -> torch.Tensor:
    output, _ = attend(*inputs, None)
    torch.autograd.grad(output, inputs, torch.ones_like(output))
    return output


def _median_seconds(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    taken: list[float] = []
    while len(taken) < CALLS or sum(taken) < seconds:
        _wait(device)
        began = time.perf_counter()
        call()
        _wait(device)
        taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


__all__ = ["fastest_forms", "time_forms", "use_forms"]
