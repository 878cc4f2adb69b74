"""What a step of pretraining costs in FLOPs, counted once by shapes alone, and what the device can do at most.

A multiplication and an addition are two FLOPs, as in `attention_cost.py`; softmax, norms, activations and what the
optimiser does are left out. Counted are the products of one plain step over the whole batch: every view through its
encoder, the expanders, the loss with its covariance, and on the way back what has a gradient. What is computed again
to save memory (checkpointed layers, a second pass over the pieces, scores in a fused kernel) counts once. Sparse
attention counts by the pairs of tokens that its pattern lets attend, however they are computed, and padding of texts
does not count.
Source: Chowdhery et al. 2022, PaLM (arXiv 2204.02311), appendix B, for the share of the peak ("MFU").

The count is made on fake tensors, shapes without numbers, of a copy of the model: it takes no memory and no random
number, and the real step stays as it is. It takes a second, so that a run of a few makes none.
"""

import copy
import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

from hf_vicreg.modeling.bigbird_blocks import ALL_ATTENTION_FUNCTIONS
from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.modeling.taught import TaughtByFeatures
from hf_vicreg.training.engine.encoders import set_up_encoders
from hf_vicreg.training.images.sources import ImageSource
from hf_vicreg.training.images.streaming import ImageStream
from hf_vicreg.training.launch.devices import device_name
from hf_vicreg.training.monitor.run_log import LateCost, StepCost
from hf_vicreg.training.run.config import RunConfig
from hf_vicreg.training.texts.captions import Captions

logger = logging.getLogger(__name__)

SMALL = 4096  # numbers of a tensor that is copied with them

# TFLOP/s of dense products by the name of the device, the first that matches, from the makers' data sheets: NVIDIA's
# of each product, halved where they are for sparse matrices, and AMD's of the MI300X. "fp32" is without tensor cores.
PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"\bMIG\b", {}),  # a part of a device: no sheet has it
    (r"\bB200\b", {"bf16": 2250, "fp16": 2250, "tf32": 1125}),
    (r"\b(H100|H200) NVL\b", {"bf16": 835, "fp16": 835, "tf32": 417.5, "fp32": 60}),
    (r"\bH100 PCIe\b", {"bf16": 756, "fp16": 756, "tf32": 378, "fp32": 51}),
    (r"\b(H100|H200)\b", {"bf16": 989, "fp16": 989, "tf32": 494.5, "fp32": 67}),
    (r"\bA100\b", {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5}),
    (r"\bL40S\b", {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6}),
    (r"\bL4\b", {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3}),
    (r"\bA10\b", {"bf16": 125, "fp16": 125, "tf32": 62.5, "fp32": 31.2}),
    (r"\bV100-SXM2\b", {"fp16": 125, "fp32": 15.7}),
    (r"\bV100-PCIE\b", {"fp16": 112, "fp32": 14}),
    (r"\bT4\b", {"fp16": 65, "fp32": 8.1}),
    (r"\bMI300X\b", {"bf16": 1307.4, "fp16": 1307.4, "fp32": 163.4}),
)


def step_cost(
    model: VicRegForPreTraining, config: RunConfig, source: ImageSource | ImageStream, accelerator: Accelerator
) -> LateCost | None:
    """Return what counts the cost of a run's steps when they have taken a while; None on processes that write no log.

    Where it cannot be counted the log says so.

    Args:
        model: With its teacher and adapters, before it is moved, compiled or shared out.
        config: Of the run.
        source: Its images, with the captions that the other branch reads.
        accelerator: Devices and precision.
    """
    if not accelerator.is_main_process:
        return None
    captions = source.captions if isinstance(source, ImageSource) else None
    try:
        shapes = shapes_of(model)
    except Exception as error:  # an encoder of others may hold what cannot be copied
        _say_why_not(error)
        return None

    def count() -> StepCost | None:
        try:
            whole, held = count_step(shapes, config, captions)
        except Exception as error:  # or do anything with tensors that hold no numbers
            _say_why_not(error)
            return None
        return StepCost(whole, held, config.run.expander_warmup_ratio, _peak_of(accelerator))

    return LateCost(count)


def _say_why_not(error: Exception) -> None:
    reason = " ".join(str(error).split())[:200]
    logger.info("the FLOPs of a step cannot be counted, the log has none: %s", reason)


def _peak_of(accelerator: Accelerator) -> float | None:
    precision = accelerator.mixed_precision
    if precision == "no":
        precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"
    peak = device_peak(device_name(accelerator.device), precision)
    return None if peak is None else peak * accelerator.num_processes


def device_peak(name: str, precision: str) -> float | None:
    """Return the FLOP/s that a device can do at most in dense products; None where no data sheet is known.

    Args:
        name: As the device calls itself, `NVIDIA H100 80GB HBM3`.
        precision: `bf16`, `fp16`, `tf32` or `fp32`.
    """
    peaks = next((peaks for pattern, peaks in PEAKS if re.search(pattern, name)), {})
    return 1e12 * peaks[precision] if precision in peaks else None


def shapes_of(model: VicRegForPreTraining) -> VicRegForPreTraining:
    """Return a copy of a model whose tensors have no numbers, small ones aside."""
    with _WithoutNumbers():
        return copy.deepcopy(model)


def count_step(shapes: VicRegForPreTraining, config: RunConfig, captions: Captions | None = None) -> tuple[int, int]:
    """Return the FLOPs of a step over all processes, and those of a step in which the encoders are held still.

    Args:
        shapes: Of `shapes_of`; nothing can be done with it afterwards.
        config: Of the run.
        captions: Of its images, where the other branch reads them.

    Raises:
        Exception: What a model does that asks tensors for numbers.
    """
    run = config.run
    with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True):
        for part in (shapes, *getattr(shapes.objective, "kept", ())):
            part.to_empty(device="cpu")
        set_up_encoders(
            shapes,
            gradient_checkpointing=False,
            torch_compile=False,
            freeze_layers=run.freeze_layers,
            freeze_second=run.freeze_text,
        )
        for one in _models_of(shapes):
            one.set_attn_implementation("eager")  # fused kernels are counted on some devices only
        # one process with all images; in evaluation no numbers are drawn, and no other process is waited for
        shapes.eval()
        images = _images(config, captions)
        if isinstance(shapes.objective, TaughtByFeatures):
            shapes.objective.stored = [torch.empty(shapes.objective.stored[0].shape)]
            shapes.objective.see(torch.zeros(config.step_size, dtype=torch.int64))
        whole = _count(shapes, images)
        held = whole
        if run.expander_warmup_ratio:
            for encoder in shapes.encoders:
                encoder.requires_grad_(False)
            held = _count(shapes, images)
    return whole, held


def _models_of(model: VicRegForPreTraining) -> Iterator[Any]:
    """Yield every model of transformers' in a wrapper, and a teacher that is no part of it."""
    for part in (model, *getattr(model.objective, "kept", ())):
        yield from (one for one in part.modules() if isinstance(one, PreTrainedModel) and one is not model)


def _images(config: RunConfig, captions: Captions | None) -> dict[str, Any]:
    """Views of a step's images without numbers, as `finish_batch` has them."""
    images, (height, width), channels = config.step_size, config.image_size, config.num_channels
    views = 2 if captions is None else config.views_beside_captions
    pixels = torch.empty(images, views, channels, height, width)
    found: dict[str, Any] = {"pixel_values": pixels if views > 1 else pixels[:, 0]}
    local, side = config.views.num_local_views, config.views.local_image_size
    if captions is not None:
        lengths = [len(one) for tokens in captions.tokens for one in tokens]
        length = captions.length or math.ceil(sum(lengths) / len(lengths))
        ids = torch.empty(images, length, dtype=torch.int64)
        found["second_inputs"] = {"input_ids": ids, "attention_mask": torch.empty_like(ids)}
    elif local:
        found["local_pixel_values"] = torch.empty(images, local, channels, side, side)
    if config.entry.takes_places:
        found["geometry"] = torch.empty(images, views + local, 6)
    return found


def _count(model: VicRegForPreTraining, images: dict[str, Any]) -> int:
    """FLOPs of a forward and a backward pass."""
    with _Products() as products, _pairs_counted() as pairs:
        loss = model.loss_of(model.encode(**images)).loss
        assert loss is not None
        loss.backward()
    for one in model.parameters():
        one.grad = None
    return products.flops + sum(pairs)


class _WithoutNumbers(TorchFunctionMode):
    """Copies of tensors that are not small are on `meta`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        copies = func in (torch.Tensor.clone, torch.Tensor.__deepcopy__)
        if copies and args[0].numel() > SMALL:
            return args[0].detach().to("meta")
        return func(*args, **(kwargs or {}))


class _Products(TorchDispatchMode):
    """Adds up what torch says that operations cost, for which torch's own counter takes ten times as long."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=found)
        return found


@contextmanager
def _pairs_counted() -> Iterator[list[int]]:
    """Let attention over patterns count its pairs in place of computing them; yields a list that fills with FLOPs."""
    found: list[int] = []

    def attend(module, query, key, value, attention_mask, *, pattern, **others):
        batch, heads, tokens, size = query.shape
        product = 2 * batch * heads * size * round(pattern.density * tokens**2)
        return _Pairs.apply(query, key, value, product, found).transpose(1, 2), None

    # what `eager` stands for where nothing is registered under the name
    assert "eager" not in ALL_ATTENTION_FUNCTIONS
    ALL_ATTENTION_FUNCTIONS["eager"] = attend
    try:
        yield found
    finally:
        del ALL_ATTENTION_FUNCTIONS["eager"]


class _Pairs(torch.autograd.Function):
    """Two products for the output, scores and values, and four on the way back."""

    @staticmethod
    def forward(ctx, query, key, value, product, found):
        ctx.product, ctx.found = product, found
        found.append(2 * product)
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx, gradient):
        ctx.found.append(4 * ctx.product)
        return *(torch.empty_like(gradient) for _ in range(3)), None, None
