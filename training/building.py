"""The parts of a pretraining run: what is opened before there is a plan, and what is built from one."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import BaseImageProcessor, PreTrainedModel

from hf_vicreg.modeling.modeling_bigbird_vit import BigBirdViTModel
from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.training.engine.encoders import AUTO, attention_of, choose_forms, take_forms, well_formed
from hf_vicreg.training.engine.loop import TrainingLoop
from hf_vicreg.training.engine.pretraining import pretraining_loop
from hf_vicreg.training.engine.resume import checkpoint_to_resume
from hf_vicreg.training.errors import InputError, as_input_error
from hf_vicreg.training.evaluation.online_probe import OnlineProbe
from hf_vicreg.training.export import Export, exported_dual, exported_encoders
from hf_vicreg.training.hub_push import HubPush, check_account
from hf_vicreg.training.image_text.probe import ImageTextProbe
from hf_vicreg.training.images.run_images import load_images, usable_images
from hf_vicreg.training.images.sources import ImageSource
from hf_vicreg.training.images.streaming import ImageStream
from hf_vicreg.training.launch.distributed import build_accelerator, check_device, run_on_main
from hf_vicreg.training.launch.signals import StopRequest
from hf_vicreg.training.monitor.masked_pictures import MaskedPictures, drawn_with, masked_pictures
from hf_vicreg.training.monitor.tracking import TRACKERS_FOLDER, start_trackers, tracker_names
from hf_vicreg.training.planner.step_cost import step_cost
from hf_vicreg.training.pretrained.companions import add_companions
from hf_vicreg.training.pretrained.text_source import refuse_other_encoders, take_text_weights
from hf_vicreg.training.pretrained.warm_start import take_source_weights
from hf_vicreg.training.run.config import RunConfig
from hf_vicreg.training.run.processors import build_processor
from hf_vicreg.training.run.run_folder import RECIPE, refuse_foreign_folder, start_folder
from hf_vicreg.training.texts.captions import Captions

logger = logging.getLogger("hf_vicreg.training.pretrain")  # one voice for the whole command


@dataclass
class OpenRun:
    """What a run has before its plan.

    Attributes:
        folder: Its own, or not there yet.
        stop: What may ask it to stop; its clock is running.
        source: Images to train on.
        bank: Labelled ones for the k-NN, of the training images.
        test: Labelled ones beside them.
        accelerator: Processes and device.
        push: To the Hub, on the main process of a run that asked for it.
    """

    folder: Path
    stop: StopRequest
    source: ImageSource | ImageStream
    bank: ImageSource | None
    test: ImageSource | None
    accelerator: Accelerator
    push: HubPush | None


@dataclass
class Run(OpenRun):
    """What a planned run has.

    Attributes:
        config: The resolved configuration.
        model: Encoders, expanders and loss.
        processor: The image processor that goes with the encoder.
        probe: What the encoders are worth, where there are labels.
        captions_probe: What images and captions are worth, where some are kept apart.
        loop: At the step where its checkpoint left it.
        density: Of the encoder's attention at its image size.
        pictures: Of what is painted, where masked images are.
    """

    config: RunConfig
    model: VicRegForPreTraining
    processor: BaseImageProcessor
    probe: OnlineProbe
    captions_probe: ImageTextProbe | None
    loop: TrainingLoop
    density: float
    pictures: MaskedPictures | None

    @property
    def encoders(self) -> Sequence[PreTrainedModel]:
        """The encoders that are exported: the averages of their weights where they are averaged."""
        return self.branches[: len(self.model.encoders)]

    @property
    def branches(self) -> Sequence[Any]:
        """The same, and behind them their expanders where images have captions."""
        average, own = self.loop.step.average, self.model.encoders if self.captions is None else self.model.branches
        return own if average is None else average.averages

    @property
    def captions(self) -> Captions | None:
        """Those of the training images."""
        return self.source.captions if isinstance(self.source, ImageSource) else None

    @property
    def exports(self) -> list[Export]:
        """The models that the run's folder holds, at its root the first one."""
        return self.exported(self.branches)

    def exported(self, branches: Sequence[Any]) -> list[Export]:
        """Return the same, made of such modules as `branches` are."""
        if self.captions is None:
            return exported_encoders(branches, self.processor)
        return exported_dual(self.model, branches, self.processor, self.captions.tokenizer)


def open_run(config: RunConfig) -> OpenRun:
    """Check folder, device and account, and read what images there are; nothing is written.

    Raises:
        InputError: One of them will not do.
    """
    run = config.run
    check_device(run.device)
    folder = Path(run.output_dir)
    stop = StopRequest(folder, run.max_time)
    refuse_foreign_folder(folder, RECIPE, resuming=run.resume_from_checkpoint is not None)
    trackers = tracker_names(run.report_to) if run.with_tracking else []
    logger.info("reading what images there are in %s", run.train_dir or run.dataset_name)
    source, bank, test = load_images(config)
    accelerator = build_accelerator(
        run.mixed_precision, device=run.device, log_with=trackers, project_dir=folder / TRACKERS_FOLDER
    )
    push = None
    if run.push_to_hub:
        repo = run.hub_model_id or ""
        run_on_main(lambda: check_account(repo), accelerator)
        push = HubPush(folder, repo, private=run.hub_private_repo) if accelerator.is_main_process else None
    return OpenRun(folder, stop, source, bank, test, accelerator, push)


def build_run(config: RunConfig, opened: OpenRun) -> Run:
    """Build model, probe and loop, and go on from a checkpoint where one is asked for; every process must call.

    Raises:
        InputError: No usable image, an encoder that takes none of this size, or a checkpoint of another run.
    """
    run, accelerator = config.run, opened.accelerator
    if isinstance(opened.source, ImageSource):
        opened.source = usable_images(opened.source, config)
    set_seed(run.seed)
    checkpoint = checkpoint_to_resume(run, accelerator)
    with as_input_error("model"):
        density = attention_density(config)
        model = VicRegForPreTraining(config.vicreg)
    if run.model_name_or_path and checkpoint is None:  # a resumed run has its weights, and needs no source
        take_source_weights(model, config)
    add_companions(model, config, opened.source)
    if run.lora_rank:
        learn, total = (model.encoder.num_parameters(only_trainable=only) for only in (True, False))
        logger.info(
            "adapters of rank %d: %s of the encoder's %s numbers learn", run.lora_rank, f"{learn:,}", f"{total:,}"
        )
    if run.text_model and checkpoint is None:
        take_text_weights(model, run.text_model)
    refuse_other_encoders(model, config)
    if model.objective.needs_tokens:
        with as_input_error("objective"):
            _encode_nothing(model, *config.image_size)
    if config.views.num_local_views:
        _refuse_size(model, config.views.local_image_size)
    set_seed(run.seed + accelerator.process_index)  # one set of weights, but every process drops paths of its own
    processor = build_processor(config)
    probe = OnlineProbe(
        opened.bank,
        opened.test,
        processor,
        model,
        accelerator,
        neighbours=run.knn_neighbours,
        num_queries=run.knn_test_samples,
        linear=run.linear_probe,
    )
    pictures = masked_pictures(model, processor, config.image_size, opened.source, opened.folder)
    captions_probe = None
    if opened.test is not None and opened.test.captions is not None:
        captions_probe = ImageTextProbe(opened.test.first(run.knn_test_samples), processor, model, accelerator)

    def figures() -> dict[str, float]:
        found = probe.logged() if probe.possible else {}
        return found | ({} if captions_probe is None else captions_probe.measure())

    can = probe.possible or captions_probe is not None
    measure = drawn_with(pictures, figures if can else None, accelerator.is_main_process)
    cost = step_cost(model, config, opened.source, accelerator)  # before the model is moved, compiled or shared out
    loop = pretraining_loop(config, opened.source, model, accelerator, measure, opened.stop)
    loop.step.cost = cost
    if checkpoint is not None:
        loop.resume(checkpoint)
    if attention_of(run.attn_implementation, accelerator.device) == AUTO:
        _choose_attention(config, model, loop)
    return Run(
        **vars(opened),
        config=config,
        model=model,
        processor=processor,
        probe=probe,
        captions_probe=captions_probe,
        loop=loop,
        density=density,
        pictures=pictures,
    )


def _choose_attention(config: RunConfig, model: VicRegForPreTraining, loop: TrainingLoop) -> None:
    """Take the forms of attention that a run began with, or those that are the fastest here."""
    accelerator, state = loop.accelerator, loop.state
    state.attention = well_formed(state.attention)
    when = "as the run began with"
    if not state.attention:
        when = "the fastest of those tried"
        images = config.run.batch_size // accelerator.num_processes
        views = 2 if config.run.caption_column is None else config.views_beside_captions
        sizes = {config.image_size: images * views}
        if config.views.num_local_views:
            side = config.views.local_image_size
            sizes[side, side] = images * config.views.num_local_views
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
        logger.info("trying which form of attention is the fastest")
        state.attention = choose_forms(model, sizes, dtype, accelerator)
    if state.attention:
        logger.info("attention by grid, %s: %s", when, ", ".join(" ".join(pair) for pair in state.attention.items()))
        take_forms(model, state.attention)


def begin(run: Run) -> None:
    """Make the folder, say what is trained, measure what there is before the first step; every process must call."""
    config, loop = run.config, run.loop
    recipe: dict[str, Any] = config.to_recipe()
    start_folder(run.folder, RECIPE, yaml.safe_dump(recipe, sort_keys=False), run.accelerator)
    sizes = [sum(one.numel() for one in encoder.parameters()) for encoder in run.model.encoders]
    logger.info(
        "%s images of %s, batch %d, %d steps; encoder of %s M parameters, attention density %.3f; objective %s",
        f"{len(run.source):,}" if isinstance(run.source, ImageSource) else "streamed",
        run.source.name,
        config.step_size,
        loop.step.num_steps,
        " and ".join(f"{size / 1e6:.2f}" for size in sizes),
        run.density,
        config.entry.name,
    )
    if run.probe.possible and "raw_pixels" not in loop.state.knn:
        loop.state.note(run.probe.of_pixels())
    if run.probe.possible and "untrained" not in loop.state.knn and not loop.state.step:
        loop.state.note(run.probe.of_encoders("untrained"))
    if loop.step.average is not None:
        run.probe.averages = run.encoders
        if run.captions_probe is not None:
            run.captions_probe.averages = run.branches
    start_trackers(run.accelerator, run.folder, recipe, loop.state.step)


def attention_density(config: RunConfig) -> float:
    """Return the mean density of the encoder's attention on the views; 1 for encoders without a pattern.

    Raises:
        ValueError: The image is smaller than one patch.
    """
    encoder = config.vicreg.encoder
    if encoder.model_type != BigBirdViTModel.config_class.model_type:
        return 1.0
    with torch.device("meta"):
        patterns = BigBirdViTModel(encoder).attention_patterns(*config.image_size)
    return sum(pattern.density for pattern in patterns) / len(patterns)


def _encode_nothing(model: VicRegForPreTraining, height: int, width: int) -> None:
    """Take two black images of a size through the encoder, as the objective wants them."""
    channels = getattr(model.config.encoder, "num_channels", None) or 3
    inputs = {"pixel_values": torch.zeros(2, 2, channels, height, width)}
    if model.objective.needs_tokens:
        inputs["geometry"] = torch.zeros(2, 2, 6)
    with torch.no_grad():
        model.eval().encode(**inputs)


def _refuse_size(model: VicRegForPreTraining, side: int) -> None:
    """Fail before anything is written when the encoder takes no images of a local view's size."""
    try:
        _encode_nothing(model, side, side)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"`views.local_image_size`: the encoder {model.config.encoder.model_type!r} takes no images of {side} "
            f"pixels: {' '.join(str(error).split())}"
        ) from error
