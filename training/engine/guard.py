"""What keeps a loss or gradient that is not finite away from the weights."""

import logging
from enum import IntEnum

import torch
from torch import nn

from hf_vicreg.training.engine.checkpoint import RunState
from hf_vicreg.training.errors import InputError

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 20  # unless a flag says otherwise


class Verdict(IntEnum):
    """On a step, the same on all processes."""

    TAKE = 0
    OVERFLOW = 1
    SKIP = 2


class StepGuard:
    """Judges steps, counts those left out, and undoes what a step's forward pass left behind in batch norms.

    A step left out changes no weight, for the optimiser does not run, but its forward pass has moved the running
    statistics of batch norms, where a single NaN stays for good.
    """

    def __init__(self, model: nn.Module, max_skipped_steps: int, scaler: torch.amp.GradScaler | None = None):
        """Find the model's batch norms.

        Args:
            model: Whose batch norms remember means and variances.
            max_skipped_steps: How many steps in a row end the run.
            scaler: That of fp16. It finds its scale by gradients that overflow: those steps are left out, too, but
                are no sign of trouble until the scale is below 1.
        """
        self.norms = [one for one in model.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
        self.max_skipped_steps, self.scaler = max_skipped_steps, scaler
        self.skipped_in_a_row = 0
        self.begin()

    def begin(self) -> None:
        """Remember the running statistics; called before the forward pass."""
        self.before = [one.clone() for norm in self.norms for one in norm.buffers()]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the running statistics back to what they were at the step's beginning."""
        for own, before in zip((one for norm in self.norms for one in norm.buffers()), self.before, strict=True):
            own.copy_(before)

    def judge(self, loss_is_finite: bool, gradient_is_finite: bool) -> Verdict:
        """Return the verdict on a step, of losses and unscaled gradients that are finite on all processes or not."""
        if not loss_is_finite:
            return Verdict.SKIP
        if gradient_is_finite:
            return Verdict.TAKE
        return Verdict.OVERFLOW if self.scaler is not None and self.scaler.get_scale() >= 1 else Verdict.SKIP

    def allows(self, verdict: Verdict, state: RunState, learning_rate: float) -> bool:
        """Return whether the step is to be taken; if not, put the statistics back, lower the scale and count.

        Args:
            verdict: That of all processes.
            state: Its `skipped_steps` is counted up, for overflows it is not.
            learning_rate: The peak, for the advice.

        Raises:
            InputError: Too many steps in a row were skipped.
        """
        if verdict == Verdict.TAKE:
            self.skipped_in_a_row = 0
            return True
        self.restore()
        if self.scaler is not None:
            self.scaler.update()
        if verdict == Verdict.OVERFLOW:
            logger.info("step %d left out: the fp16 gradient overflowed", state.step)
            return False
        state.skipped_steps += 1
        self.skipped_in_a_row += 1
        logger.warning("step %d skipped: loss or gradient is not finite", state.step)
        if self.skipped_in_a_row >= self.max_skipped_steps:
            raise InputError(
                f"`learning_rate`: loss or gradient was not finite for {self.max_skipped_steps} steps in a row; "
                f"lower it from {learning_rate} or lengthen the warm-up, and resume from the last checkpoint."
            )
        return False
