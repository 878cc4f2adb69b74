"""The gradient of a step, over as many images as the loss's batch has, in as many pieces as the memory demands.

One piece goes through the encoder once. Of several, every one goes through it without a graph first, and its
representations are kept. The expander and the loss see them all: batch norm and covariance are those of the whole
batch. Their gradient at the representations is then carried on into the encoder by a second pass over the pieces, with
the random numbers of the first. Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory
Limited Setup" (arXiv 2101.06983), with the cut before the expander instead of after it, so that its batch norm is
exact.

Processes wait for each other in the expander and the loss alone. The passes through the encoder, which take the
memory, are each process's own: one that runs out of memory there can tell the others, and all try again with smaller
pieces.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining, VicRegOutput, has_batch_norm
from hf_vicreg.training.engine.step import DeviceFull
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.launch.devices import restore_rng, rng_states
from hf_vicreg.training.launch.distributed import host_group
from hf_vicreg.training.launch.sharding import average_copies, is_sharded

Result = TypeVar("Result")


def two_pass_backward(
    model: VicRegForPreTraining,
    pieces: Sequence[Callable[[], dict[str, torch.Tensor]]],
    backward: Callable[[torch.Tensor], Any],
) -> VicRegOutput:
    """Add the gradient of the loss over all pieces to the parameters and return the loss's output.

    Under a process group, every process must call with as many images. Gradients are this process's own, not averaged
    yet: see `average_gradients`.

    Args:
        model: In training mode.
        pieces: Each returns the arguments of the model for some of the images, the same in both passes.
        backward: Called with the loss; computes gradients, scaled or not.

    Raises:
        ValueError: No piece, or several for an encoder with batch norms.
        DeviceFull: A process had no memory left for its pass through the encoder; nothing is left of the graph.
    """
    if not pieces:
        raise ValueError("`pieces`: expected at least one, got none.")
    if len(pieces) > 1:
        refuse_batch_norm(model)
    device, sharded = next(model.parameters()).device, is_sharded(model)
    states: list[list[torch.Tensor]] = []

    def encode() -> list[list[torch.Tensor]]:
        found = []
        with torch.set_grad_enabled(len(pieces) == 1):
            for piece in pieces:
                states.append(rng_states(device))
                found.append(model.encode(**piece()))
        return found

    def carry_on() -> None:
        start = 0
        for piece, state, parts in zip(pieces, states, encoded, strict=True):
            again = parts
            if len(pieces) > 1:
                restore_rng(state, device)
                again = model.encode(**piece())
            end = start + len(parts[0])
            # a frozen encoder has no graph, and places of patches have no gradient
            seen = [
                (one, gradient[start:end])
                for one, gradient in zip(again, [leaf.grad for leaf in leaves], strict=True)
                if one.requires_grad and gradient is not None
            ]
            if sharded:  # between copies of the weights the gradient goes once, after the last piece
                average_copies(model, now=end == len(leaves[0]))
            if seen:
                torch.autograd.backward([one for one, _ in seen], [gradient for _, gradient in seen])
            start = end

    encoded = _together(encode, sharded)
    leaves = [torch.cat(parts).detach().requires_grad_() for parts in zip(*encoded, strict=True)]
    outputs = model.loss_of(leaves)
    assert outputs.loss is not None
    backward(outputs.loss)
    _together(carry_on, sharded)
    return outputs


def _together(action: Callable[[], Result], sharded: bool) -> Result:
    """Return what an action of this process alone returns, when those of all processes went well.

    Raises:
        DeviceFull: One of them had no memory left.
        InputError: This one had none, and weights are shared out: the others wait for it in the middle of theirs.
    """
    result, failure = None, None
    try:
        result = action()
    except torch.OutOfMemoryError as error:
        failure = str(error)
        if sharded:
            raise InputError(
                "`batch_size`: expected a step to fit into the device's memory, it does not: "
                f"{' '.join(failure.split())[:200]}; lower it, and keep the loss's by --statistics_batch_size."
            ) from error
    failed = failure is not None
    if dist.is_initialized() and dist.get_world_size() > 1:
        flag = torch.tensor(int(failed))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=host_group())
        failed = bool(flag)
    if failed:
        raise DeviceFull(failure or "another process ran out of memory")
    return result  # type: ignore[return-value]


def refuse_batch_norm(model: VicRegForPreTraining) -> None:
    """Raise ValueError for an encoder with batch norms, which would see one piece of the batch and not the whole."""
    found = [one.config.model_type for one in model.encoders if has_batch_norm(one)]
    if found:
        raise ValueError(
            "`statistics_batch_size`: expected an encoder without batch norms, which would see a part of the images, "
            f"got {found[0]!r}; use the batch size alone, or another encoder."
        )


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over all processes; every one must call."""
    # those that are shared out have been averaged where they were made
    gradients = [one.grad for one in parameters if one.grad is not None and not is_sharded(one)]
    for work in [dist.all_reduce(one, async_op=True) for one in gradients]:
        work.wait()
    for one in gradients:
        one /= dist.get_world_size()


def share_buffers(model: VicRegForPreTraining) -> None:
    """Give every process the main one's buffers of encoders with batch norms; every one must call."""
    for encoder in (*model.encoders, *model.objective.teachers):
        if has_batch_norm(encoder):
            for buffer in encoder.buffers():
                dist.broadcast(buffer, 0)
