"""The training loop: one step is batch, views, loss, backward, guard, update; then log, measure, checkpoint."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining, VicRegOutput
from hf_vicreg.training.engine.checkpoint import RunState, remove_leftovers
from hf_vicreg.training.engine.encoders import set_up_encoders
from hf_vicreg.training.engine.guard import StepGuard, Verdict
from hf_vicreg.training.engine.optim import build_optimizer, learning_rate_at
from hf_vicreg.training.engine.resume import checkpoint_together, resume_from
from hf_vicreg.training.engine.two_pass import (
    DeviceFull,
    average_gradients,
    refuse_batch_norm,
    share_buffers,
    two_pass_backward,
)
from hf_vicreg.training.errors import InputError, RunStopped
from hf_vicreg.training.images.colour import finish_batch
from hf_vicreg.training.images.order import MAX_SUBSTITUTES, StepSampler, ViewDataset, collate, split_batch
from hf_vicreg.training.images.sources import ImageSource
from hf_vicreg.training.images.streaming import ImageStream, stream_batches
from hf_vicreg.training.images.views import ViewSampler
from hf_vicreg.training.launch.distributed import gather_sets, largest, restore_rng, rng_states
from hf_vicreg.training.launch.signals import StopReason, StopRequest, outlive_signals
from hf_vicreg.training.monitor.health import measure_health
from hf_vicreg.training.monitor.progress import Progress
from hf_vicreg.training.monitor.run_log import RunLog, Stopwatch
from hf_vicreg.training.run.config import RunConfig

logger = logging.getLogger(__name__)


class Trainer:
    """Runs one pretraining to its end, from wherever its checkpoint left it."""

    def __init__(
        self,
        config: RunConfig,
        source: ImageSource | ImageStream,
        model: VicRegForPreTraining,
        accelerator: Accelerator,
        measure: Callable[[], dict[str, float]] | None,
        stop: StopRequest,
    ):
        """Set up optimiser and data order.

        Args:
            config: The run's configuration.
            source: Images to train on.
            model: Encoder, expander and loss.
            accelerator: Processes and device.
            measure: Called on every process; returns accuracies by the names they have in the log.
            stop: Asked after every step.

        Raises:
            InputError: The batch does not fit the data or the number of processes, or an encoder cannot recompute its
                layers.
        """
        run = config.run
        self.config, self.run, self.accelerator, self.measure = config, run, accelerator, measure
        self.source, self.stop = source, stop
        # called on the main process after each checkpoint that training goes on from
        self.on_checkpoint: Callable[[RunState], None] | None = None
        self.folder = Path(run.output_dir)
        self.pieces = config.step_size // run.batch_size
        if isinstance(source, ImageSource) and config.step_size > len(source):
            raise InputError(
                f"`{'batch_size' if self.pieces == 1 else 'statistics_batch_size'}`: expected at most the "
                f"{len(source)} images of {source.name}, got {config.step_size}; lower it or give more images."
            )
        if self.pieces > 1:
            try:
                refuse_batch_norm(model)
            except ValueError as error:
                raise InputError(str(error)) from error
        if run.batch_size % accelerator.num_processes:
            raise InputError(
                f"`batch_size`: expected a multiple of {accelerator.num_processes} processes, got {run.batch_size}."
            )
        if isinstance(source, ImageSource):
            self.steps_per_epoch = len(source) // config.step_size
            self.num_steps = run.max_steps or run.num_train_epochs * self.steps_per_epoch
        else:  # nobody knows where a stream's epochs end: the run counts as one
            assert run.max_steps is not None
            self.steps_per_epoch = self.num_steps = run.max_steps
        set_up_encoders(
            model,
            gradient_checkpointing=run.gradient_checkpointing,
            torch_compile=run.torch_compile,
            attn_implementation=run.attn_implementation,
        )
        betas = (run.adam_beta1, run.adam_beta2)
        optimizer = build_optimizer(model, run.optim, run.learning_rate, run.weight_decay, betas)
        # in evaluation mode, accelerate's word for no DistributedDataParallel: gradients are averaged in `_backward`
        self.model = accelerator.prepare_model(model, evaluation_mode=True)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.unwrapped: VicRegForPreTraining = accelerator.unwrap_model(self.model)
        self.state = RunState(recipe=config.to_recipe(), data_fingerprint=source.fingerprint)
        self.unusable: set[int] = set()
        self.splits = 1  # of what goes through the encoder at once, after a device has run out of memory
        self.guard = StepGuard(self.unwrapped, run.max_skipped_steps, accelerator.scaler)
        self.stopping = StopReason.NONE
        self.process_group = torch.distributed.group.WORLD if accelerator.num_processes > 1 else None

    def resume(self, checkpoint: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            InputError: It belongs to another configuration or other data.
        """
        self.state = resume_from(
            checkpoint, self.state, self.unwrapped, self.optimizer.optimizer, self.accelerator, self.num_steps
        )
        self.unusable = set(self.state.unusable)

    def fit(self) -> RunState:
        """Train to the last step and return where the run stands; every process must call.

        Raises:
            InputError: No readable image where one was needed, no room for a checkpoint, or loss or gradient not
                finite many times in a row.
            RunStopped: It was asked to stop and has written a checkpoint.
        """
        run, state, accelerator = self.run, self.state, self.accelerator
        if accelerator.is_main_process:
            remove_leftovers(self.folder / "checkpoints")
        log = RunLog(self.folder, state.step, self.accelerator, self.config.vicreg.gamma)
        self.model.train()
        progress = Progress(self.num_steps, state.step, shown=accelerator.is_local_main_process)
        seconds_before, started = state.training_seconds, time.perf_counter()
        stopwatch = Stopwatch()
        with closing(stopwatch.waits(self._loader(state.step))) as waited:
            for batches in zip(*[waited] * self.pieces, strict=True):
                self._refuse_unusable(batches)
                outputs, grad_norm, learning_rate = self._step(batches)
                state.step += 1
                stopwatch.count(self.config.step_size, grad_norm)
                last = state.step == self.num_steps
                stopping = bool(self.stopping) and not last
                if state.step % run.logging_steps == 0 or last:
                    record = {
                        "step": state.step,
                        "epoch": state.step / self.steps_per_epoch,
                        **{part: outputs[part].item() for part in ("loss", "invariance", "variance", "covariance")},
                        **measure_health(outputs, self.process_group),
                        "grad_norm": grad_norm,
                        "learning_rate": learning_rate,
                        "skipped_steps": state.skipped_steps,
                        **stopwatch.read(accelerator),
                    }
                    for verdict in log.write(record):
                        progress.write(f"warning: {verdict}")
                    progress.describe(
                        "loss {loss:.2f} inv {invariance:.3f} var {variance:.3f} cov {covariance:.2f} "
                        "{images_per_second:.0f} img/s".format(**record)
                    )
                progress.update(state.step)
                if self.measure and self._measurement_due() and not last and not stopping:
                    pause = time.perf_counter()
                    epoch = state.step // self.steps_per_epoch
                    accuracies = self.measure()
                    log.write({"step": state.step, "epoch": epoch, **accuracies})
                    found = ", ".join(f"{name} {accuracy:.3f}" for name, accuracy in accuracies.items())
                    progress.write(f"epoch {epoch}: {found}")
                    stopwatch.exclude(time.perf_counter() - pause)
                if state.step % run.checkpointing_steps == 0 or last or stopping:
                    state.training_seconds = seconds_before + time.perf_counter() - started
                    self._checkpoint()
                    if self.on_checkpoint is not None and accelerator.is_main_process and not (last or stopping):
                        self.on_checkpoint(state)
                if stopping:
                    progress.close()
                    self._leave()
        progress.close()
        return state

    def _measurement_due(self) -> bool:
        """Whether an epoch has just ended after which accuracies are measured."""
        epoch, rest = divmod(self.state.step, self.steps_per_epoch)
        every = self.run.knn_every_epochs
        return rest == 0 and every > 0 and epoch % every == 0

    def _refuse_unusable(self, batches: Sequence[dict[str, Any]]) -> None:
        """Note images that could not be used; InputError if no other could take one's place."""
        self.unusable.update(index for batch in batches for index in batch["unusable"])
        empty = next((batch for batch in batches if batch["views"] is None), None)
        if empty is not None:
            last_one = self.source.describe(empty["unusable"][-1])
            message = (
                f"`{self.source.name}`: expected usable images, found {MAX_SUBSTITUTES} drawn in "
                f"a row that are corrupt or smaller than a patch, the last of them {last_one}; check the data."
            )
            if not self.accelerator.is_main_process:
                logger.error(message)  # the others do not see this process's share
            raise InputError(message)

    def _loader(self, first_step: int) -> Iterable[dict[str, Any]]:
        run, accelerator = self.run, self.accelerator
        samplers = ViewSampler.of_views(self.config.views, self.config.image_size)
        workers = run.dataloader_num_workers
        if workers is None:
            workers = 0 if accelerator.device.type == "cpu" else min(8, max(1, torch.get_num_threads() - 1))
            logger.info("dataloader_num_workers: %d chosen", workers)
        if isinstance(self.source, ImageStream):
            return stream_batches(
                self.source,
                samplers,
                seed=run.seed,
                first_step=first_step,
                num_batches=(self.num_steps - first_step) * self.pieces,
                batch_size=run.batch_size // accelerator.num_processes,
                num_workers=workers,
                process_index=accelerator.process_index,
                num_processes=accelerator.num_processes,
                pin_memory=accelerator.device.type == "cuda",
            )
        # not prepared by accelerate: the sampler already knows each process's share of each step
        return DataLoader(
            ViewDataset(self.source, samplers, run.seed),
            batch_sampler=StepSampler(
                len(self.source),
                self.config.step_size,
                run.seed,
                first_step,
                self.num_steps,
                accelerator.process_index,
                accelerator.num_processes,
                self.pieces,
            ),
            num_workers=workers,
            collate_fn=collate,
            # its own generator: the loader draws a seed when it starts, which would shift a resumed run's randomness
            generator=torch.Generator().manual_seed(run.seed),
            worker_init_fn=outlive_signals,
            pin_memory=accelerator.device.type == "cuda",
            persistent_workers=False,
        )

    def _backward(self, batches: Sequence[dict[str, Any]]) -> VicRegOutput:
        """The gradient of the loss over all batches of a step; in smaller pieces where a device is full."""
        device = self.accelerator.device
        states = rng_states(device)
        while True:
            parts = [part for batch in batches for part in split_batch(batch, self.splits)]
            pieces = [partial(finish_batch, part, device) for part in parts]
            try:
                outputs = two_pass_backward(self.unwrapped, pieces, self.accelerator.backward)
                break
            except DeviceFull as error:
                reason = str(error)
            self._halve(reason)
            self.unwrapped.zero_grad()
            self.guard.restore()
            restore_rng(states, device)
        if self.accelerator.num_processes > 1:
            average_gradients(self.unwrapped.parameters())
            share_buffers(self.unwrapped)
        return outputs

    def _halve(self, reason: str) -> None:
        """Let half as many images at once through the encoder from now on, on every process.

        Raises:
            InputError: A single image is too much, or the encoder has to see its batch at once.
        """
        share = self.run.batch_size // self.accelerator.num_processes
        at_once = -(-share // self.splits)
        if at_once == 1 or self.unwrapped.encoder_has_batch_norm:
            raise InputError(
                f"`batch_size`: expected {at_once} image(s) of one device to fit into its memory, they do not: "
                f"{' '.join(reason.split())[:200]}; choose a smaller encoder, image or batch."
            )
        self.splits *= 2
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.accelerator.is_main_process:
            logger.warning(
                "step %d: the device ran out of memory with %d images at once; it is taken again with %d. The batch "
                "of the loss stays %d.",
                self.state.step,
                at_once,
                -(-share // self.splits),
                self.config.step_size,
            )

    def rehearse(self, seconds: float) -> tuple[list[float], list[float]]:
        """Take a few steps from the first one on to learn how fast they are; nothing else is done with this trainer.

        Args:
            seconds: About how long; at least three steps and at most twenty are taken, after one to warm up.

        Returns:
            Seconds of each step, and how many of them were spent waiting for images.
        """
        self.model.train()
        stopwatch, taken, waits = Stopwatch(), [], []
        enough = 3
        with closing(stopwatch.waits(self._loader(0))) as waited:
            started = time.perf_counter()
            for batches in zip(*[waited] * self.pieces, strict=True):
                self._refuse_unusable(batches)
                self._step(batches)
                if self.accelerator.device.type == "cuda":
                    torch.cuda.synchronize()
                self.state.step += 1
                now = time.perf_counter()
                taken.append(now - started)
                waits.append(stopwatch.waited)
                started, stopwatch.waited = now, 0.0
                if len(taken) == 2:  # all processes take as many steps
                    enough = min(20, max(3, round(seconds / taken[1])))
                    (enough,) = largest([enough], self.accelerator)
                if len(taken) > enough:
                    break
        return taken[1:], waits[1:]

    def _step(self, batches: Sequence[dict[str, Any]]) -> tuple[VicRegOutput, float, float]:
        """One optimiser step; returns the outputs, the norm of the encoders' gradient and the learning rate."""
        run = self.run
        learning_rate = learning_rate_at(
            self.state.step, self.num_steps, run.learning_rate, run.warmup_ratio, run.min_learning_rate
        )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.guard.begin()
        outputs = self._backward(batches)
        self.accelerator.unscale_gradients()
        grad_norm, other_norm = self._clip()
        # no process may step alone, and all have to stop at the same step
        own_verdict = self.guard.judge(outputs["loss"].item(), grad_norm + other_norm)
        verdict, reason = largest([own_verdict, self.stop.reason()], self.accelerator)
        self.stopping = StopReason(reason)
        if self.guard.allows(Verdict(verdict), self.state, run.learning_rate):
            self.optimizer.step()
        self.unwrapped.zero_grad()  # also what the optimiser leaves alone
        return outputs, grad_norm, learning_rate

    def _clip(self) -> tuple[float, float]:
        """Clip the encoders' gradient; return its norm from before, and that of the expanders'."""
        encoders = [one for encoder in self.unwrapped.encoders for one in encoder.parameters()]
        known = set(encoders)
        others = [one.grad for one in self.unwrapped.parameters() if one not in known and one.grad is not None]
        grad_norm = torch.nn.utils.clip_grad_norm_(encoders, self.run.max_grad_norm or math.inf)
        return grad_norm.item(), torch.nn.utils.get_total_norm(others).item()

    def _checkpoint(self) -> None:
        accelerator, run, state = self.accelerator, self.run, self.state
        self.unusable = gather_sets(self.unusable, accelerator)
        state.unusable = sorted(self.unusable)
        state.scaler = {} if accelerator.scaler is None else accelerator.scaler.state_dict()
        checkpoint_together(
            self.folder / "checkpoints",
            state,
            self.unwrapped,
            self.optimizer.optimizer,
            run.checkpoints_total_limit,
            accelerator,
            run.checkpoints_keep_every_steps,
        )

    def _leave(self) -> None:
        """Say where the run stands and leave, on all processes."""
        message = (
            f"stopped by {self.stopping} at step {self.state.step} of {self.num_steps}; go on with "
            "--resume_from_checkpoint latest"
        )
        if self.accelerator.is_main_process:
            self.stop.fulfilled()
            logger.warning(message)
        self.accelerator.wait_for_everyone()  # a launcher ends the others as soon as the first one leaves
        raise RunStopped(message)
