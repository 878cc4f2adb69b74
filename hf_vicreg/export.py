"""A model as a program that runs without this package: an ONNX graph, or a program of `torch.export`.

What is written is run in a process that cannot import the package, on images in batches of 1, 2 and 7, and compared
with the model. A grid where attention is by blocks is exported as gathers of keys and values, in standard operators.
"""

import importlib.util
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForImageClassification, AutoModelForObjectDetection, PreTrainedModel

from hf_vicreg.drift import pictures_of, pixels_of
from hf_vicreg.modeling.modeling_vicreg_dual_encoder import VicRegDualEncoder
from hf_vicreg.training.errors import InputError, blamed_on
from hf_vicreg.training.evaluation.encoder import load_config, load_processor, load_vision_encoder, load_weights

logger = logging.getLogger(__name__)

SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
BATCHES = (1, 2, 7)
TOLERANCE = 1e-4
TIMEOUT_S = 1800
REPEATS = 5


# what an exported program gives, by name
TASKS = {
    "features": ("pooler_output", "last_hidden_state"),
    "classification": ("logits",),
    "detection": ("logits", "pred_boxes"),
}


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compares with the model.

    Attributes:
        path: The program.
        images: What the comparison was made on.
        height: Of the images, in pixels.
        width: The same.
        difference: Largest absolute difference of any output, for batches of 1, 2 and 7.
        cosine: Smallest cosine between the first output of an image here and there.
        bytes: Of the file.
        model_bytes: Of the model's weights.
        seconds: Per image, of the program.
        model_seconds: Per image, of the model in PyTorch.
    """

    path: Path
    images: str
    height: int
    width: int
    difference: float
    cosine: float
    bytes: int
    model_bytes: int
    seconds: float
    model_seconds: float

    def __str__(self) -> str:
        """Return a table for a person."""
        rows = [
            ("", "PyTorch", self.path.name),
            ("MB", f"{self.model_bytes / 1e6:.1f}", f"{self.bytes / 1e6:.1f}"),
            ("ms per image", f"{1000 * self.model_seconds:.1f}", f"{1000 * self.seconds:.1f}"),
        ]
        lines = [f"{name:14}{one:>12}{other:>24}" for name, one, other in rows]
        return "\n".join(
            [
                *lines,
                f"{self.height}x{self.width} pixels, {self.images}, batches of {', '.join(map(str, BATCHES))}:",
                f"largest difference {self.difference:.1e}, smallest cosine {self.cosine:.6f}",
            ]
        )


def export(
    model: str,
    out: str | os.PathLike,
    *,
    format: str,
    task: str = "features",
    height: int | None = None,
    width: int | None = None,
    int8: bool = False,
    images: str | os.PathLike | None = None,
) -> Exported:
    """Write a model as a program, run it without this package, and compare.

    Args:
        model: Folder or Hub id.
        out: File to write, ending in `.onnx` or `.pt2`.
        format: `onnx`, for onnxruntime and its kin, or `torch`, for `torch.export.load`.
        task: `features`, `classification` or `detection`.
        height: Of the images in pixels, a multiple of the patch; default: the model's.
        width: The same.
        int8: Weights of linear layers as 8-bit integers (ONNX's dynamic quantisation); the comparison says what it
            costs.
        images: Folder of images to compare on, of which the first 8 are used; default: noise.

    Returns:
        How the program compares.

    Raises:
        InputError: Bad input, a missing library, or a program that gives something else; nothing is left.
    """
    path = _checked_path(out, format, task, int8)
    network, processor, outputs_of = _load(model, task)
    size = _size(network.config, processor, height, width)
    channels = getattr(network.config, "num_channels", 3)
    pictures, described = pictures_of(images, channels)
    pixels = pixels_of(pictures, processor, channels, *size)
    pixels = pixels[torch.arange(max(BATCHES)) % len(pixels)]
    program = _Program(network, outputs_of).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".exporting_") as scratch:
        written = Path(scratch) / path.name
        logger.info("exporting %s at %dx%d pixels", model, *size)
        _write(program, TASKS[task], pixels[:3], written, format, int8)
        logger.info("running it without the package")
        expected, model_seconds = _run_model(program, pixels)
        found, seconds = _run_program(written, pixels)
        difference = max(float(np.abs(found[name] - one).max()) for name, one in expected.items())
        last = f"{max(BATCHES)}/0"
        cosine = _smallest_cosine(found[last], expected[last])
        if not int8 and not difference <= TOLERANCE:
            raise InputError(
                f"`format`: expected a program equal to the model to {TOLERANCE}, got {difference:.1e}; nothing was "
                "written."
            )
        written.replace(path)
    weights = sum(one.numel() * one.element_size() for one in network.parameters())
    return Exported(path, described, *size, difference, cosine, path.stat().st_size, weights, seconds, model_seconds)


class _Program(nn.Module):
    """A model from pixels to a tuple of tensors."""

    def __init__(self, model: PreTrainedModel, outputs_of: Callable[[Any], tuple[torch.Tensor, ...]]):
        super().__init__()
        self.model, self.of = model, outputs_of

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.of(self.model(pixel_values=pixel_values))


def _checked_path(out: str | os.PathLike, format: str, task: str, int8: bool) -> Path:
    if format not in SUFFIXES:
        raise InputError(f"`format`: expected one of {', '.join(SUFFIXES)}, got {format!r}.")
    if task not in TASKS:
        raise InputError(f"`task`: expected one of {', '.join(TASKS)}, got {task!r}.")
    if int8 and format != "onnx":
        raise InputError("`int8`: expected --format onnx beside it, got torch; leave one of the two out.")
    path = Path(out)
    if path.suffix != SUFFIXES[format]:
        raise InputError(f"`OUT`: expected a file ending in {SUFFIXES[format]} for {format}, got {path.name!r}.")
    if path.is_dir():
        raise InputError(f"`OUT`: expected a file, {str(path)!r} is a folder.")
    needed = ("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ()
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"`format`: expected {' and '.join(missing)} to be installed for 'onnx'; pip install 'hf-vicreg[export]'."
        )
    return path


def _load(model: str, task: str) -> tuple[PreTrainedModel, Any, Callable[[Any], tuple[torch.Tensor, ...]]]:
    """Return the model of a task on the CPU, its image processor, and what takes the tensors from its output."""
    if task == "features":
        encoder = load_vision_encoder(model)
        if isinstance(encoder.model, VicRegDualEncoder):
            raise InputError(
                f"`MODEL`: expected an encoder of images, got {model}, which is one of images and texts; "
                f"give {os.path.join(model, 'image_encoder')}."
            )
        # not what a pooler without weights makes of it
        return (
            encoder.model.cpu().eval(),
            encoder.processor,
            lambda found: (encoder.feature_of(found), found.last_hidden_state),
        )
    config = load_config(model)
    kind = AutoModelForImageClassification if task == "classification" else AutoModelForObjectDetection
    with blamed_on("MODEL", f"expected a model for {task} in {model!r}, got one of type {config.model_type!r}"):
        network, info = load_weights(kind, model)
    if info["missing_keys"]:
        name = sorted(info["missing_keys"])[0]
        raise InputError(f"`MODEL`: expected weights for the whole model in {model}, found none for {name}.")
    processor = load_processor(model, network.config)
    return network.eval(), processor, lambda found: tuple(getattr(found, name) for name in TASKS[task])


def _size(config: Any, processor: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """Return the image size: what was asked for, else the processor's canvas or the model's own."""
    inner = getattr(config, "backbone_config", None) or config
    own = getattr(inner, "image_size", None) or 224
    rows, columns = (own, own) if isinstance(own, int) else own
    canvas = getattr(processor, "pad_size", None)
    if canvas:
        rows, columns = canvas["height"], canvas["width"]
    patch = getattr(inner, "patch_size", None) or 1
    patches = (patch, patch) if isinstance(patch, int) else tuple(patch)
    stride = getattr(inner, "patch_stride", None) or patches
    strides = (stride, stride) if isinstance(stride, int) else tuple(stride)
    size = (height or rows, width or columns)
    for name, side, one, step in zip(("height", "width"), size, patches, strides, strict=True):
        if side < one or (side - one) % step:
            raise InputError(
                f"`{name}`: expected a multiple of the patch of {one} pixels"
                + (f" (one patch and steps of {step})" if step != one else "")
                + f", got {side}."
            )
    return size


def _write(
    program: nn.Module, outputs: Sequence[str], pixels: torch.Tensor, path: Path, format: str, int8: bool
) -> None:
    shapes = {"pixel_values": {0: torch.export.Dim("batch", max=2**16)}}
    try:
        with torch.no_grad():
            if format == "torch":
                torch.export.save(torch.export.export(program, (pixels,), dynamic_shapes=shapes), path)
                return
            _write_onnx(program, outputs, pixels, path, shapes)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"`format`: this model cannot be written as {format!r}: {reason}") from error
    if int8:
        from onnxruntime.quantization import quantize_dynamic

        whole = path.with_stem(f"{path.stem}_fp32")
        path.replace(whole)
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.ERROR)  # it advises what its own command line could do
        quantize_dynamic(whole, path)
        root.setLevel(level)
        whole.unlink()


def _write_onnx(
    program: nn.Module, outputs: Sequence[str], pixels: torch.Tensor, path: Path, shapes: dict[str, Any]
) -> None:
    import onnx

    # the exporter's own optimisation loses a node of some detectors; onnxruntime optimises once more anyway
    for optimize in (True, False):
        graph = torch.onnx.export(
            program,
            (pixels,),
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["pixel_values"],
            output_names=list(outputs),
            verbose=False,
            optimize=optimize,
        )
        assert graph is not None
        graph.save(path, external_data=False)
        try:
            onnx.checker.check_model(path)
        except onnx.checker.ValidationError:
            if not optimize:
                raise RuntimeError("the exporter wrote a graph that is not valid ONNX") from None
        else:
            return


def _run_model(program: nn.Module, pixels: torch.Tensor) -> tuple[dict[str, np.ndarray], float]:
    with torch.no_grad():
        found = {
            f"{size}/{index}": one.numpy() for size in BATCHES for index, one in enumerate(program(pixels[:size]))
        }
        seconds = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            program(pixels)
            seconds.append(time.perf_counter() - started)
    return found, statistics.median(seconds) / len(pixels)


def _run_program(path: Path, pixels: torch.Tensor) -> tuple[dict[str, np.ndarray], float]:
    """Run a program in a process of its own.

    Raises:
        InputError: It does not run there.
    """
    path = path.resolve()  # the process runs in its folder
    inputs, outputs = path.with_suffix(".in.npz"), path.with_suffix(".out.npz")
    np.savez(inputs, **{str(size): pixels[:size].numpy() for size in BATCHES})  # type: ignore[arg-type]
    script = resources.files("hf_vicreg") / "exported_program.py"
    # -P: the script's own folder, full of this package's modules, is no place to import from
    command = [sys.executable, "-P", str(script), str(path), str(inputs), str(outputs)]
    try:
        finished = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=path.parent, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"`format`: expected the program to run within {TIMEOUT_S} s, it did not.") from None
    if finished.returncode:
        reason = (finished.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"`format`: the program does not run without the package: {reason[:300]}")
    return dict(np.load(outputs)), float(finished.stdout.split()[-1])


def _smallest_cosine(found: np.ndarray, expected: np.ndarray) -> float:
    one, other = (torch.from_numpy(each).flatten(1).double() for each in (found, expected))
    return float(nn.functional.cosine_similarity(one, other).min())
