"""Steps whose loss or gradient is not finite: left out, counted, and too many in a row end the run."""

import logging
import math

import torch
from torch import nn

from hf_vicreg.training.checkpoint import RunState
from hf_vicreg.training.errors import InputError

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 20


class FiniteGuard:
    """Lets a step through or undoes what its forward pass has left in the model.

    A skipped step changes no weight, for the optimiser does not run, but its forward pass has moved the running
    statistics of batch norms, where a single NaN stays for good.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.skipped_in_a_row = 0
        self.begin()

    def begin(self) -> None:
        """Remember the model's buffers; called before the forward pass."""
        self.buffers = [one.clone() for one in self.model.buffers()]

    def allows(self, *numbers: float, state: RunState, learning_rate: float) -> bool:
        """Return whether the step is to be taken; if not, count it and put the buffers back.

        Args:
            numbers: Loss and norm of the gradient, the same on every process.
            state: Its `skipped_steps` is counted up.
            learning_rate: The peak, for the advice.

        Raises:
            InputError: The last of `MAX_SKIPPED_IN_A_ROW` steps in a row that were not finite.
        """
        if all(map(math.isfinite, numbers)):
            self.skipped_in_a_row = 0
            return True
        with torch.no_grad():
            for own, before in zip(self.model.buffers(), self.buffers, strict=True):
                own.copy_(before)
        state.skipped_steps += 1
        self.skipped_in_a_row += 1
        logger.warning("step %d skipped: loss or gradient is not finite", state.step)
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise InputError(
                f"`learning_rate`: loss or gradient was not finite for {MAX_SKIPPED_IN_A_ROW} steps in a row; "
                f"lower it from {learning_rate} or lengthen the warm-up, and resume from the last checkpoint."
            )
        return False
