"""A step of pretraining: views of each image, the loss of the whole batch, in pieces that fit the memory."""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining, VicRegOutput
from hf_vicreg.modeling.taught import TaughtByFeatures
from hf_vicreg.training.engine.average import WeightAverage
from hf_vicreg.training.engine.checkpoint import RunState
from hf_vicreg.training.engine.encoders import attention_of, set_up_encoders
from hf_vicreg.training.engine.loop import LoopSettings, TrainingLoop
from hf_vicreg.training.engine.optim import build_optimizer, unseen_parameters
from hf_vicreg.training.engine.step import TrainingStep, short, speed
from hf_vicreg.training.engine.two_pass import average_gradients, refuse_batch_norm, share_buffers, two_pass_backward
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.colour import finish_batch, placed_batch
from hf_vicreg.training.images.files.shard_batches import shard_batches
from hf_vicreg.training.images.files.shard_stream import ShardStream
from hf_vicreg.training.images.order import MAX_SUBSTITUTES, StepSampler, ViewDataset, collate, split_batch
from hf_vicreg.training.images.sources import ImageSource
from hf_vicreg.training.images.streaming import ImageStream, stream_batches
from hf_vicreg.training.images.views import ViewSampler
from hf_vicreg.training.launch.devices import free_cache
from hf_vicreg.training.launch.distributed import gather_sets
from hf_vicreg.training.launch.sharding import mesh_over, shard_weights, whole
from hf_vicreg.training.launch.signals import StopRequest, outlive_signals
from hf_vicreg.training.monitor.health import measure_health
from hf_vicreg.training.run.config import RunConfig

logger = logging.getLogger(__name__)


def pretraining_loop(
    config: RunConfig,
    source: ImageSource | ImageStream,
    model: VicRegForPreTraining,
    accelerator: Accelerator,
    measure: Callable[[], dict[str, float]] | None,
    stop: StopRequest,
) -> TrainingLoop:
    """Return the loop of one pretraining, at its first step.

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
    step = PretrainingStep(config, source, model, accelerator)
    return TrainingLoop(
        step,
        LoopSettings.of(config.run, measure_steps=config.run.knn_every_epochs * step.steps_per_epoch),
        accelerator,
        RunState(recipe=config.to_recipe(), data_fingerprint=source.fingerprint),
        folder=Path(config.run.output_dir),
        measure=measure,
        stop=stop,
        gamma=config.vicreg.gamma,
        objective=config.entry,
    )


class PretrainingStep(TrainingStep[VicRegOutput]):
    """Views, encoders, expanders and loss."""

    model: VicRegForPreTraining

    def __init__(
        self,
        config: RunConfig,
        source: ImageSource | ImageStream,
        model: VicRegForPreTraining,
        accelerator: Accelerator,
    ):
        """Set up encoders, optimiser and data order; arguments and errors as for `pretraining_loop`."""
        run = config.run
        self.config, self.run, self.accelerator, self.source, self.model = config, run, accelerator, source, model
        self.objective = config.entry
        model.objective.shares_are_equal = True  # by the sampler; asking in each step would wait for the device
        self.parts = self.objective.parts
        self.pieces, self.images_per_step = config.step_size // run.batch_size, config.step_size
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
        if isinstance(source, ShardStream):
            source.refuse_processes(run.batch_size, accelerator.num_processes)
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
            attn_implementation=attention_of(run.attn_implementation, accelerator.device),
            freeze_layers=run.freeze_layers,
            freeze_second=run.freeze_text,
        )
        if run.shard_weights and accelerator.num_processes > 1:
            shard_weights(model, model.branches, accelerator.device, mesh_over(accelerator.device, run.dp_shard_size))
        betas = (run.adam_beta1, run.adam_beta2)
        rates = run.layer_decay, run.expander_lr_scale
        optimizer = build_optimizer(model, run.optim, run.learning_rate, run.weight_decay, betas, *rates)
        # held still for the first steps; as a function of the step, so that a resumed run does the same
        self.expander_steps = round(run.expander_warmup_ratio * self.num_steps)
        self.learning = [one for encoder in model.encoders for one in encoder.parameters() if one.requires_grad]
        # in evaluation mode, accelerate's word for no DistributedDataParallel: gradients are averaged in `backward`
        self.model = accelerator.unwrap_model(accelerator.prepare_model(model, evaluation_mode=True))
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.captions = source.captions if isinstance(source, ImageSource) else None
        # images and texts are compared behind their expanders: those are averaged as well
        averaged = self.model.encoders if self.captions is None else self.model.branches
        self.average = WeightAverage(averaged, run.ema_decay) if run.ema_decay else None
        self.unusable: set[int] = set()
        self.cursors: dict[int, list[int]] = {}
        self.splits = 1  # of what goes through the encoder at once, after a device has run out of memory
        self.process_group = torch.distributed.group.WORLD if accelerator.num_processes > 1 else None

    def backward(self, batches: Sequence[dict[str, Any]], step: int) -> VicRegOutput:
        """The gradient of the loss over all batches of a step; see `TrainingStep`."""
        self._refuse_unusable(batches)
        self._hold_encoders(step < self.expander_steps)
        parts = [part for batch in batches for part in split_batch(batch, self.splits)]
        finished = (self.accelerator.device, self.config.normalisation, self.config.channel_ranges)
        finish = placed_batch if self.objective.takes_places else finish_batch
        pieces = [partial(finish, part, *finished) for part in parts]
        if isinstance(self.model.objective, TaughtByFeatures):
            self.model.objective.see(torch.cat([part["index"] for part in parts]))
        self.model.begin_step(step, self.num_steps)
        outputs = two_pass_backward(self.model, pieces, self.accelerator.backward)
        if self.accelerator.num_processes > 1:
            average_gradients(self.model.parameters())
            share_buffers(self.model)
        return outputs

    def loss_of(self, outcome: VicRegOutput) -> torch.Tensor:
        """Return the loss over the whole batch."""
        return outcome["loss"].detach()

    def record(self, outcome: VicRegOutput) -> dict[str, float]:
        """Return the loss and its parts, and the health of embeddings and representations."""
        parts = outcome if outcome.parts is None else outcome.parts
        beside = [name for name in ("teacher_error", "image_pair") if name in parts]
        found = {part: parts[part].item() for part in (*self.parts, *beside)}
        health = measure_health(outcome, self.process_group, unit_sphere=self.objective.unit_sphere)
        return {"loss": outcome["loss"].item()} | found | health

    def describe(self, record: dict[str, float]) -> str:
        """Return loss, parts and speed."""
        parts = [f"{short(name)} {record[name]:.3f}" for name in self.parts]
        return " ".join([f"loss {record['loss']:.2f}", *parts, speed(record)])

    def end(self) -> None:
        """Let the average and what the objective keeps beside the model follow its weights."""
        super().end()
        self.model.end_step()

    def clip(self, max_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip the encoders' gradient; return its norm from before, and that of the expanders'."""
        unseen = set(unseen_parameters(self.model).values())  # no scaler undoes its factor on what the optimiser lacks
        encoders = [one for encoder in self.model.encoders for one in encoder.parameters() if one not in unseen]
        known = unseen.union(encoders)
        others = [one.grad for one in self.model.parameters() if one not in known and one.grad is not None]
        return whole(torch.nn.utils.clip_grad_norm_(encoders, max_norm)), whole(torch.nn.utils.get_total_norm(others))

    def shrink(self, reason: str, step: int) -> None:
        """Let half as many images at once through the encoder from now on.

        Raises:
            InputError: A single image is too much, or the encoder has to see its batch at once.
        """
        share = self.run.batch_size // self.accelerator.num_processes
        at_once = -(-share // self.splits)
        if at_once == 1 or self.model.encoder_has_batch_norm:
            raise InputError(
                f"`batch_size`: expected {at_once} image(s) of one device to fit into its memory, they do not: "
                f"{' '.join(reason.split())[:200]}; choose a smaller encoder, image or batch."
            )
        self.splits *= 2
        free_cache(self.accelerator.device)
        if self.accelerator.is_main_process:
            logger.warning(
                "step %d: the device ran out of memory with %d images at once; it is taken again with %d. The batch "
                "of the loss stays %d.",
                step,
                at_once,
                -(-share // self.splits),
                self.config.step_size,
            )

    def resumed(self, state: RunState) -> None:
        """Take over the order of images, and those that could not be used."""
        super().resumed(state)
        self.unusable = set(state.unusable)
        self.cursors = {int(lane): cursor for lane, cursor in state.cursors.items()}

    def before_checkpoint(self, state: RunState) -> None:
        """Note the images that could not be used and where the lanes through shards stand, of all processes."""
        self.unusable = gather_sets(self.unusable, self.accelerator)
        state.unusable = sorted(self.unusable)
        if isinstance(self.source, ShardStream):
            lanes = list(self.cursors.items())
            lanes = gather_object(lanes) if self.accelerator.num_processes > 1 else lanes
            state.cursors = {str(lane): cursor for lane, cursor in sorted(lanes)}

    def batches(self, first_step: int) -> Iterable[dict[str, Any]]:
        """Return batches of views, in an order that follows from the seed alone."""
        run, accelerator = self.run, self.accelerator
        samplers = ViewSampler.of_views(self.config.views, self.config.image_size)
        samplers = samplers if self.captions is None else samplers[: self.config.views_beside_captions]
        workers = run.dataloader_num_workers
        if workers is None:
            workers = 0 if accelerator.device.type == "cpu" else min(8, max(1, torch.get_num_threads() - 1))
            logger.info("dataloader_num_workers: %d chosen", workers)
        if isinstance(self.source, ImageStream):
            shared: dict[str, Any] = {
                "seed": run.seed,
                "num_batches": (self.num_steps - first_step) * self.pieces,
                "num_workers": workers,
                "process_index": accelerator.process_index,
                "num_processes": accelerator.num_processes,
                "pin_memory": accelerator.device.type == "cuda",
            }
            if isinstance(self.source, ShardStream):
                size, cursors = run.batch_size, self.cursors
                return shard_batches(self.source, samplers, batch_size=size, cursors=cursors, **shared)
            size = run.batch_size // accelerator.num_processes
            return stream_batches(self.source, samplers, batch_size=size, first_step=first_step, **shared)
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
                self.order,
            ),
            num_workers=workers,
            collate_fn=partial(collate, captions=self.captions),
            # its own generator: the loader draws a seed when it starts, which would shift a resumed run's randomness
            generator=torch.Generator().manual_seed(run.seed),
            worker_init_fn=outlive_signals,
            pin_memory=accelerator.device.type == "cuda",
            persistent_workers=False,
        )

    def _hold_encoders(self, held: bool) -> None:
        """Let the encoders learn from now on, or not; what does not learn is in evaluation mode."""
        if self.learning and self.learning[0].requires_grad == held:
            for parameter in self.learning:
                parameter.requires_grad_(not held)
            self.train_mode()

    def _refuse_unusable(self, batches: Sequence[dict[str, Any]]) -> None:
        """Note images that could not be used; InputError if no other could take one's place."""
        self.unusable.update(index for batch in batches for index in batch["unusable"])
        for batch in batches:
            self.cursors |= batch.get("cursors", {})
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
