"""How much memory a step will take, told before the first one, and a batch that fits.

The real model is run on tensors without numbers: what its forward pass keeps for its backward pass is counted to the
byte. A process holds more than that. On a CPU the C library keeps freed blocks below 32 MiB to itself, in pieces that
the next tensor may not fit into; larger ones go back to the system at once. The two ratios were fitted to six
configurations (`benchmarks/planned_memory.py`) and tried on others; see docs/experiments.md.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel, PreTrainedModel

from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining, has_batch_norm
from hf_vicreg.training.engine.encoders import add_adapters, set_up_encoders
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import load_config
from hf_vicreg.training.launch.devices import has_bf16
from hf_vicreg.training.launch.sharding import largest_unit
from hf_vicreg.training.planner.machine import Machine, resident_memory
from hf_vicreg.training.run.config import RunConfig

OPTIMIZER_STATES = {"adamw": 2, "lars": 1}  # tensors of a parameter's size
LARGE_BYTES = 2**25  # glibc's largest threshold, from which a block is the system's own
# of what is kept in small tensors and in large ones; those of GPUs are guesses on the safe side
ALLOCATOR_RATIOS = {"cpu": (1.85, 1.2), "cuda": (1.15, 1.15), "mps": (1.3, 1.3)}
CONTEXT_BYTES = 2**29  # what a GPU's driver and libraries take beside the tensors


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one process in a training step.

    Attributes:
        weights: Parameters, their gradients and the optimiser's state, fp32.
        encoder: What the encoders' forward pass keeps for the backward pass.
        expander: What expanders and loss keep.
        large_ratio: Share of the two that is in tensors of `LARGE_BYTES` and more.
        inputs: The batch as pixels, all views.
        images: That go through the encoder at once.
        has_batch_norm: Whether an encoder has batch norms, and sees its batch at once or not at all.
    """

    weights: int
    encoder: int
    expander: int
    inputs: int
    images: int
    large_ratio: float
    has_batch_norm: bool

    def peak(self, device: str, pieces: int = 1) -> int:
        """Return the largest amount held, on a CPU without what the process held before.

        Args:
            device: `cpu`, `cuda` or `mps`.
            pieces: In so many parts the images go through the encoder, one after the other.
        """
        small, large = ALLOCATOR_RATIOS.get(device, ALLOCATOR_RATIOS["mps"])
        share = self.large_ratio if pieces == 1 else 0.0  # pieces have smaller tensors
        kept = (self.encoder // pieces + self.expander) * (small * (1 - share) + large * share)
        return self.weights + int(kept + large * self.inputs / pieces)


def step_memory(
    config: RunConfig, images: int, *, autocast: torch.dtype | None = None, processes: int = 1
) -> StepMemory:
    """Return the memory of a step over so many images of one process.

    Args:
        config: The run's; encoders, expander and views.
        images: That go through the encoder at once in this process.
        autocast: Precision of the forward pass, None for full.
        processes: Of the run; weights may be shared out over them, or over `dp_shard_size` of them.
    """
    height, width = config.image_size
    local, side = config.views.num_local_views, config.views.local_image_size
    with torch.device("meta"):
        model = VicRegForPreTraining(config.vicreg).train()
        if config.run.lora_rank:
            add_adapters(model.encoder, config.run.lora_rank)
    for encoder in model.encoders:
        for size in {(height, width), *([(side, side)] if local else [])}:
            _fill_tables(encoder, size)
    model._process_group = lambda: None  # these shapes are this process's own
    kept = _Kept()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        set_up_encoders(
            model,
            gradient_checkpointing=config.run.gradient_checkpointing,
            torch_compile=False,
            freeze_layers=config.run.freeze_layers,
            freeze_second=config.run.freeze_text,
        )
        views = torch.empty(images, 2, config.num_channels, height, width)
        inputs: dict[str, Any] = {"pixel_values": views}
        if config.run.caption_column is not None:
            most = getattr(config.vicreg.second_encoder, "max_position_embeddings", None)
            length = min(config.run.max_text_length, most or config.run.max_text_length)
            tokens = torch.zeros(images, length, dtype=torch.int64)
            seen = views if config.views_beside_captions == 2 else views[:, 0]
            inputs = {"pixel_values": seen, "second_inputs": {"input_ids": tokens}}
        if local:
            inputs["local_pixel_values"] = torch.empty(images, local, config.num_channels, side, side)
        if model.objective.needs_tokens:
            inputs["geometry"] = torch.empty(images, 2 + local, 6)
        with kept, torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            found = model.encode(**inputs)
            given = [one for one in inputs.values() if isinstance(one, torch.Tensor)]
            pixels = {one.untyped_storage()._cdata for one in given}
            encoder_bytes = kept.total(without=pixels)
            model.loss_of([one.detach().requires_grad_() for one in found])
            expander_bytes = kept.total(without=pixels) - encoder_bytes
    trained = 2 + OPTIMIZER_STATES[config.run.optim]
    weights = sum(one.nbytes * (trained if one.requires_grad else 1) for one in model.parameters())
    if config.run.teacher:
        weights += _bytes_of(config.run.teacher)
    if config.run.ema_decay:
        weights += sum(one.nbytes for encoder in model.encoders for one in encoder.parameters())
    if config.run.shard_weights and processes > 1:  # and a unit's weights and gradients as a whole, while it computes
        weights = weights // (config.run.dp_shard_size or processes) + 2 * largest_unit(model.branches)
    return StepMemory(
        weights=weights,
        encoder=encoder_bytes,
        expander=expander_bytes,
        inputs=sum(one.nbytes for one in given),
        images=images,
        large_ratio=kept.large(without=pixels) / max(1, encoder_bytes + expander_bytes),
        has_batch_norm=any(has_batch_norm(one) for one in model.encoders),
    )


def _bytes_of(teacher: str) -> int:
    """The weights of a teacher, which keeps nothing for a way back."""
    with torch.device("meta"):
        return sum(one.nbytes for one in AutoModel.from_config(load_config(teacher, "teacher")).parameters())


def _fill_tables(encoder: PreTrainedModel, size: tuple[int, int]) -> None:
    """Make what transformers caches for a size: made among shapes, it would be shapes for good."""
    if encoder.config.model_type == "dinov3_vit":  # coordinates of patches
        copy.deepcopy(encoder.rope_embeddings).to_empty(device="cpu")(torch.empty(1, 3, *size))


class _Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the storages that are kept for a backward pass, each once, parameters left out."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}
        self.alive: list[torch.Tensor] = []  # a freed storage's address would be used again
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            self.storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        self.alive.append(tensor)
        return tensor

    def total(self, without: set[int]) -> int:
        """Return their bytes."""
        return sum(size for storage, size in self.storages.items() if storage not in without)

    def large(self, without: set[int]) -> int:
        """Return the bytes of the large ones."""
        found = (size for storage, size in self.storages.items() if storage not in without)
        return sum(size for size in found if size >= LARGE_BYTES)


def predicted_peak(memory: StepMemory, machine: Machine, pieces: int = 1) -> int:
    """Return the bytes this process will hold at its peak, with what it holds already."""
    before = resident_memory() if machine.device == "cpu" else CONTEXT_BYTES
    return before + memory.peak(machine.device, pieces)


def fit_memory(config: RunConfig, machine: Machine) -> tuple[RunConfig, int]:
    """Return a configuration that fits into the memory, and the peak it is predicted to have in bytes.

    Where the batch is too large to go through the encoder at once it goes in equal parts; the loss's batch, and with
    it what is computed, stays the same.

    Args:
        config: Not changed.
        machine: What a process may use.

    Raises:
        InputError: It does not fit in any number of parts.
    """
    run = config.run
    share = run.batch_size // machine.num_processes
    halved = machine.device == "cuda" and (
        has_bf16("cuda") if run.mixed_precision == "auto" else run.mixed_precision != "no"
    )
    whole = config.step_size // machine.num_processes
    autocast = torch.bfloat16 if halved else None
    memory = step_memory(config, share, autocast=autocast, processes=machine.num_processes)
    if whole > share:  # the expander sees the batch of the loss
        memory = replace(memory, expander=memory.expander * whole // share)
    for pieces in (one for one in range(1, share + 1) if share % one == 0):
        peak = predicted_peak(memory, machine, pieces)
        if peak <= machine.usable_memory:
            if pieces == 1:
                return config, peak
            if memory.has_batch_norm:
                break
            smaller = replace(run, batch_size=run.batch_size // pieces, statistics_batch_size=config.step_size)
            return replace(config, run=smaller), peak
    peak = predicted_peak(memory, machine, 1 if memory.has_batch_norm else share)
    raise InputError(
        f"`max_memory`: expected about {_gigabytes(peak / 0.9)} for this encoder and batch, found "
        f"{_gigabytes(machine.memory)} that this process may use; choose a smaller encoder, image, expander"
        f"{' or batch' if memory.has_batch_norm else ''}."
    )


def _gigabytes(size: float) -> str:
    return f"{size / 2**30:.1f} GB"
