"""The training loop of pretraining and of every task: gradient, guard, update; then log, measure, checkpoint, stop."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hf_vicreg.training.engine.checkpoint import RunState, remove_leftovers
from hf_vicreg.training.engine.guard import MAX_SKIPPED_IN_A_ROW, StepGuard
from hf_vicreg.training.engine.optim import learning_rate_at
from hf_vicreg.training.engine.resume import checkpoint_together, resume_from
from hf_vicreg.training.engine.step import DeviceFull, TrainingStep, learning_rates
from hf_vicreg.training.errors import RunStopped
from hf_vicreg.training.launch.background import Background
from hf_vicreg.training.launch.devices import restore_rng, rng_states, synchronize
from hf_vicreg.training.launch.distributed import largest, read_once
from hf_vicreg.training.launch.signals import StopReason, StopRequest
from hf_vicreg.training.monitor.progress import Progress
from hf_vicreg.training.monitor.run_log import RunLog, Stopwatch
from hf_vicreg.training.objectives.entry import ObjectiveEntry
from hf_vicreg.training.objectives.vicreg import VICREG

logger = logging.getLogger(__name__)

REHEARSED_STEPS, SLOW_STEP_S = (3, 20), 10.0  # one step that long tells enough


@dataclass(frozen=True)
class LoopSettings:
    """How a loop steps, and how often it logs, measures and keeps.

    Attributes:
        learning_rate: The peak.
        warmup_ratio: Share of the steps in which it rises to that; a cosine follows.
        max_grad_norm: Clip the norm of the gradient; 0 or None turns it off.
        min_learning_rate: At the last step.
        expander_warmup_ratio: Share of the steps that come before the warm-up; see `learning_rate_at`.
        logging_steps: Steps between lines of the log; there is one more at the end.
        checkpointing_steps: Steps between checkpoints; there is one more at the end.
        checkpoints_total_limit: Newest checkpoints to keep.
        checkpoints_keep_every_steps: Checkpoints of multiples of it are kept for good.
        max_skipped_steps: Steps in a row that are not finite until the run ends.
        measure_steps: Steps between measurements; 0 is never.
    """

    learning_rate: float
    warmup_ratio: float
    max_grad_norm: float | None
    min_learning_rate: float = 0.0
    expander_warmup_ratio: float = 0.0
    logging_steps: int = 10
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    checkpoints_keep_every_steps: int | None = None
    max_skipped_steps: int = MAX_SKIPPED_IN_A_ROW
    measure_steps: int = 0

    @classmethod
    def of(cls, flags: Any, **others: Any) -> "LoopSettings":
        """Return settings from a command's flags of the same names."""
        own = {one.name: getattr(flags, one.name) for one in dataclasses.fields(cls) if hasattr(flags, one.name)}
        return cls(**own | others)


class TrainingLoop:
    """Takes the steps of one run, from wherever its checkpoint left it to the end."""

    def __init__(
        self,
        step: TrainingStep,
        settings: LoopSettings,
        accelerator: Accelerator,
        state: RunState,
        *,
        folder: Path | None,
        measure: Callable[[], dict[str, float]] | None = None,
        stop: StopRequest | None = None,
        gamma: float | None = None,
        objective: ObjectiveEntry = VICREG,
    ):
        """Take no step yet.

        Args:
            step: What is trained.
            settings: How.
            accelerator: Processes and device.
            state: With the configuration and the data's fingerprint, at step 0.
            folder: Of `log.jsonl` and `checkpoints`; None leaves nothing on the disk.
            measure: Called on every process; returns figures by the names they have in the log.
            stop: Asked after every step.
            gamma: Target of the embeddings' standard deviation where the log is to be watched for a collapse.
            objective: What the log is then judged by.
        """
        self.step, self.settings, self.accelerator, self.state = step, settings, accelerator, state
        self.folder, self.measure, self.stop = folder, measure, stop
        self.gamma, self.objective = gamma, objective
        # called on the main process after each checkpoint that training goes on from
        self.on_checkpoint: Callable[[RunState], None] | None = None
        self.guard = StepGuard(step.model, settings.max_skipped_steps, accelerator.scaler)
        self.stopping, self.background = StopReason.NONE, Background()

    @property
    def epoch(self) -> float:
        """Passes over the images so far."""
        return self.state.step / self.step.steps_per_epoch

    def resume(self, checkpoint: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            InputError: It belongs to another configuration or other data.
        """
        optimizer = self.step.optimizer.optimizer
        self.state = resume_from(
            checkpoint, self.state, self.step.model, optimizer, self.accelerator, self.step.num_steps
        )
        if self.step.average is not None:
            self.step.average.load(checkpoint)
        self.step.resumed(self.state)

    def fit(self) -> RunState:
        """Train to the last step and return where the run stands; every process must call.

        Raises:
            InputError: No readable image where one was needed, no room for a checkpoint, or loss or gradient not
                finite many times in a row.
            RunStopped: It was asked to stop and has written a checkpoint.
        """
        step, state, settings, accelerator = self.step, self.state, self.settings, self.accelerator
        if self.folder is not None and accelerator.is_main_process:
            remove_leftovers(self.folder / "checkpoints")
        log = self.log = RunLog(self.folder, state.step, accelerator, self.gamma, self.objective)
        step.train_mode()
        progress = Progress(step.num_steps, state.step, shown=accelerator.is_local_main_process)
        seconds_before, started = state.training_seconds, time.perf_counter()
        stopwatch = Stopwatch(step.cost, step.num_steps)
        with closing(stopwatch.waits(step.batches(state.step))) as waited, self.background:
            for batches in zip(*[waited] * step.pieces, strict=True):
                outcome, taken = self._take(batches)
                state.step += 1
                stopwatch.count(step.images_per_step, taken["grad_norm"], state.step - 1)
                last = state.step == step.num_steps
                stopping = bool(self.stopping) and not last
                if state.step % settings.logging_steps == 0 or last:
                    record = self._where() | step.record(outcome) | taken | stopwatch.read(accelerator)
                    for verdict in log.write(record):
                        progress.write(f"warning: {verdict}")
                    progress.describe(step.describe(record))
                progress.update(state.step)
                if self._measurement_due() and not last and not stopping:
                    pause = time.perf_counter()
                    self._measure(progress)
                    pause = time.perf_counter() - pause
                    stopwatch.exclude(pause)
                    started += pause
                state.training_seconds = seconds_before + time.perf_counter() - started
                if state.step % settings.checkpointing_steps == 0 or last or stopping:
                    self._checkpoint(wait=last or stopping)
                    if self.on_checkpoint is not None and accelerator.is_main_process and not (last or stopping):
                        self.on_checkpoint(state)
                if stopping:
                    progress.close()
                    self._leave()
        progress.close()
        return state

    def note(self, figures: dict[str, float]) -> None:
        """Add a line about the present step to the log; every process must call."""
        self.log.write(self._where() | figures)

    def rehearse(self, seconds: float) -> tuple[list[float], list[float]]:
        """Take a few steps from the first one on to learn how fast they are; nothing else is done with this loop.

        Args:
            seconds: About how long; at least three steps (of slow ones one) and at most twenty, after one to warm up.

        Returns:
            Seconds of each step, and how many of them were spent waiting for images.
        """
        self.step.train_mode()
        stopwatch, taken, waits = Stopwatch(), [], []
        enough, most = REHEARSED_STEPS
        with closing(stopwatch.waits(self.step.batches(0))) as waited:
            started = time.perf_counter()
            for batches in zip(*[waited] * self.step.pieces, strict=True):
                self._take(batches)
                synchronize(self.accelerator.device)
                self.state.step += 1
                now = time.perf_counter()
                taken.append(now - started)
                waits.append(stopwatch.waited)
                started, stopwatch.waited = now, 0.0
                if len(taken) == 2:  # all processes take as many steps
                    enough = 1 if taken[1] > SLOW_STEP_S else enough
                    (enough,) = largest([min(most, max(enough, round(seconds / taken[1])))], self.accelerator)
                if len(taken) > enough:
                    break
        return taken[1:], waits[1:]

    def _take(self, batches: Sequence[Any]) -> tuple[Any, dict[str, float]]:
        """One optimiser step; returns what came of it, and what the log says of every step."""
        step, settings, state = self.step, self.settings, self.state
        learning_rate = learning_rate_at(
            state.step,
            step.num_steps,
            settings.learning_rate,
            settings.warmup_ratio,
            settings.min_learning_rate,
            settings.expander_warmup_ratio,
        )
        learning_rates(step.optimizer, learning_rate)
        self.guard.begin()
        outcome = self._gradient(batches)
        self.accelerator.unscale_gradients()
        grad_norm, other_norm = step.clip(settings.max_grad_norm or math.inf)
        # no process may step alone, and all have to stop at the same step
        loss, reason = step.loss_of(outcome), StopReason.NONE if self.stop is None else self.stop.reason()
        judged = torch.stack([loss.isfinite().logical_not(), (grad_norm + other_norm).isfinite().logical_not()])
        (bad_loss, bad_gradient, common), (norm,) = read_once([*judged, reason], [grad_norm], self.accelerator)
        self.stopping = StopReason(int(common))
        if self.guard.allows(self.guard.judge(not bad_loss, not bad_gradient), state, settings.learning_rate):
            step.optimizer.step()
            step.end()
        step.model.zero_grad()  # also what the optimiser leaves alone
        return outcome, {
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "skipped_steps": state.skipped_steps,
        }

    def _gradient(self, batches: Sequence[Any]) -> Any:
        """The gradient of a step; in smaller pieces where a device is full."""
        device = self.accelerator.device
        states = rng_states(device)
        while True:
            try:
                return self.step.backward(batches, self.state.step)
            except DeviceFull as error:
                reason = str(error)
            self.step.shrink(reason, self.state.step)
            self.step.model.zero_grad()
            self.guard.restore()
            restore_rng(states, device)

    def _where(self) -> dict[str, float]:
        return {"step": self.state.step, "epoch": self.epoch}

    def _measurement_due(self) -> bool:
        every = self.settings.measure_steps
        return self.measure is not None and every > 0 and self.state.step % every == 0

    def _measure(self, progress: Progress) -> None:
        assert self.measure is not None
        figures = self.measure()
        self.step.train_mode()
        if not figures:
            return
        self.note(figures)
        place = f"epoch {self.epoch:g}" if self.epoch.is_integer() else f"step {self.state.step}"
        progress.write(f"{place}: " + ", ".join(f"{name} {one:.3f}" for name, one in figures.items()))

    def _checkpoint(self, wait: bool) -> None:
        if self.folder is None:
            return
        accelerator, settings = self.accelerator, self.settings
        self.step.before_checkpoint(self.state)
        self.state.scaler = {} if accelerator.scaler is None else accelerator.scaler.state_dict()
        checkpoint_together(
            self.folder / "checkpoints",
            self.state,
            self.step.model,
            self.step.optimizer.optimizer,
            settings.checkpoints_total_limit,
            accelerator,
            settings.checkpoints_keep_every_steps,
            self.step.average,
            background=self.background,
            wait=wait,
        )

    def _leave(self) -> None:
        """Say where the run stands and leave, on all processes."""
        message = (
            f"stopped by {self.stopping} at step {self.state.step} of {self.step.num_steps}; go on with "
            "--resume_from_checkpoint latest"
        )
        if self.accelerator.is_main_process:
            assert self.stop is not None
            self.stop.fulfilled()
            logger.warning(message)
        self.accelerator.wait_for_everyone()  # a launcher ends the others as soon as the first one leaves
        raise RunStopped(message)
