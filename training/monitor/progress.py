"""How far a run is, for a person to see."""

import logging
import sys
import time

from tqdm import tqdm

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 20


class Progress:
    """A bar with the remaining time on a terminal; where output goes to a file, a line now and then instead."""

    def __init__(self, num_steps: int, first_step: int, *, shown: bool, unit: str = "step"):
        """Start at `first_step` of `num_steps`, or of another `unit`; `shown` on one process of a machine alone."""
        self.unit = unit
        self.num_steps, self.first_step, self.step, self.shown = num_steps, first_step, first_step, shown
        self.text = ""
        self.started = self.last_line = time.monotonic()
        self.bar = None
        if shown and sys.stderr.isatty():
            self.bar = tqdm(
                total=num_steps,
                initial=first_step,
                mininterval=0.5,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} {elapsed}<{remaining}{postfix}",
            )

    def update(self, step: int) -> None:
        """Say that `step` steps are done."""
        done, self.step = step - self.step, step
        if self.bar is not None:
            self.bar.update(done)
        elif self.shown:
            now = time.monotonic()
            if now - self.last_line >= SECONDS_BETWEEN_LINES or step == self.num_steps:
                self.last_line = now
                seconds = (now - self.started) / (step - self.first_step) * (self.num_steps - step)
                left = tqdm.format_interval(seconds)
                logger.info("%s %d/%d, %s left  %s", self.unit, step, self.num_steps, left, self.text)

    def describe(self, text: str) -> None:
        """Show `text` beside the progress from the next update on."""
        self.text = text
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)

    def write(self, text: str) -> None:
        """Print a line of its own without disturbing the bar."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        elif self.shown:
            logger.info(text)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()
