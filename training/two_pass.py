"""A step over more images than go through the encoder at once, with the gradient of the whole batch.

First every piece of the batch goes through the encoder without a graph, and its representations are kept. The expander
and the loss see them all: batch norm and covariance are those of the whole batch. Their gradient at the
representations is then carried on into the encoder by a second pass over the pieces, with the random numbers of the
first. Source: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (arXiv
2101.06983), with the cut before the expander instead of after it, so that its batch norm is exact.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining, VicRegOutput, has_batch_norm
from hf_vicreg.training.distributed import restore_rng, rng_states


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
        ValueError: No piece, or an encoder with batch norms.
    """
    if not pieces:
        raise ValueError("`pieces`: expected at least one, got none.")
    refuse_batch_norm(model)
    device = next(model.parameters()).device
    states, encoded = [], []
    with torch.no_grad():
        for piece in pieces:
            states.append(rng_states(device))
            encoded.append(_views(model(**piece(), return_loss=False)))
    leaves = [torch.cat(parts).requires_grad_() for parts in zip(*encoded, strict=True)]
    outputs = model(representations=leaves)
    backward(outputs.loss)
    start = 0
    for piece, state, parts in zip(pieces, states, encoded, strict=True):
        restore_rng(state, device)
        end = start + len(parts[0])
        again = _views(model(**piece(), return_loss=False))
        # a frozen encoder has no graph
        gradients = [leaf.grad[start:end] for leaf in leaves if leaf.grad is not None]
        with_graph = [index for index, one in enumerate(again) if one.requires_grad]
        if with_graph:
            torch.autograd.backward([again[index] for index in with_graph], [gradients[index] for index in with_graph])
        start = end
    return outputs


def refuse_batch_norm(model: VicRegForPreTraining) -> None:
    """Raise ValueError for an encoder with batch norms, which would see one piece of the batch and not the whole."""
    found = [one.config.model_type for one in model.encoders if has_batch_norm(one)]
    if found:
        raise ValueError(
            "`statistics_batch_size`: expected an encoder without batch norms, which would see a part of the images, "
            f"got {found[0]!r}; use the batch size alone, or another encoder."
        )


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over all processes, as DistributedDataParallel does; every one must call."""
    gradients = [one.grad for one in parameters if one.grad is not None]
    for work in [dist.all_reduce(one, async_op=True) for one in gradients]:
        work.wait()
    for one in gradients:
        one /= dist.get_world_size()


def _views(outputs: VicRegOutput) -> list[torch.Tensor]:
    found = outputs.representations
    assert found is not None
    return list(found.unbind(1) if isinstance(found, torch.Tensor) else found)
