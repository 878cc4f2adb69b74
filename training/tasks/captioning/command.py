"""`hf-vicreg finetune captioning`: a pretrained encoder and images with captions in, a captioner's folder out."""

import logging
import time
from collections import Counter
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import BaseImageProcessor, PreTrainedTokenizerFast, VisionEncoderDecoderModel

from hf_vicreg.modeling.configuration_bigbird_vit import BigBirdViTConfig
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import load_config, public_name, weights_digest
from hf_vicreg.training.evaluation.labelled import count_overlap
from hf_vicreg.training.evaluation.results import FILE, describe_data
from hf_vicreg.training.images.channels.raster import arrays_of
from hf_vicreg.training.launch.distributed import build_accelerator
from hf_vicreg.training.tasks.arguments import CaptioningArguments, check_task, settings_of
from hf_vicreg.training.tasks.captioning.data import (
    CaptionedViews,
    caption_tokens,
    collate,
    label_inputs,
    load_captioning,
    model_inputs,
    padded,
)
from hf_vicreg.training.tasks.captioning.model import build_captioner, build_tokenizer, learning_rate_scale
from hf_vicreg.training.tasks.data import AnnotatedImages, read_for
from hf_vicreg.training.tasks.prepared import PreparedTask
from hf_vicreg.training.tasks.training import ModelLossStep, fine_tune, save_tuned, tuned_record, tuning_loop

logger = logging.getLogger(__name__)

NUM_SAMPLES = 16
LOADING_SNIPPET = """\
import hf_vicreg
from transformers import AutoImageProcessor, AutoTokenizer, VisionEncoderDecoderModel

processor, tokenizer = AutoImageProcessor.from_pretrained("{folder}"), AutoTokenizer.from_pretrained("{folder}")
model = VisionEncoderDecoderModel.from_pretrained("{folder}")
tokens = model.generate(processor(images, return_tensors="pt").pixel_values)
captions = tokenizer.batch_decode(tokens, skip_special_tokens=True)"""


def finetune_captioning(model_name: str, arguments: CaptioningArguments) -> dict[str, Any]:
    """Train a decoder over a pretrained encoder, test it, and leave a folder whose `generate` writes captions.

    Args:
        model_name: Folder or Hub id of the pretrained encoder.
        arguments: The flags.

    Returns:
        The entry of `results.json`.

    Raises:
        InputError: Bad input; nothing has been overwritten.
    """
    started = time.perf_counter()
    folder = check_task(arguments)
    config = load_config(model_name)
    # models of others may have parameters that no forward pass reaches; a decoder does not look at pooled features
    all_used = config.model_type == BigBirdViTConfig.model_type and config.pooler_act is None
    accelerator = build_accelerator(arguments.mixed_precision, find_unused_parameters=not all_used)
    task, tester = prepare_captioning(model_name, arguments, accelerator)
    train, test, processor, tokenizer = task.train, task.test, task.processor, tester.tokenizer
    overlap = count_overlap(train.digests, test.digests)
    recipe = settings_of(arguments) | {"weights": task.weights}
    step = ModelLossStep(task, arguments, accelerator)
    loop = tuning_loop(step, arguments, accelerator, recipe, train.fingerprint, folder, task.measure)
    fine_tune(loop, arguments, model_name, recipe, f"{len(train)} captioned images, {len(tokenizer)} tokens")
    metrics, captions = tester.measure()
    loop.note(metrics)
    most_frequent, count = Counter(test.annotations).most_common(1)[0]
    record = tuned_record(
        "finetune_captioning",
        loop,
        step.model,
        processor,
        feature="captions",
        data=describe_data(arguments, train, test, overlap, **task.facts),
        settings=settings_of(arguments),
        metrics=metrics,
        details={
            "pretrained_model": None if arguments.from_scratch else public_name(model_name),
            "samples": [
                {"written": captions[index], "given": test.annotations[index]}
                for index in sorted(captions)[:NUM_SAMPLES]
            ],
            "most_frequent_caption": {"text": most_frequent, "share": count / len(test)},
            "unreadable_test_images": len(test) - len(captions),
        },
        pictures=[],
        started=started,
    )
    if accelerator.is_main_process:
        save_tuned(folder, record, step.model, processor, tokenizer)
        print(f"\n{metrics['exact_match']:.3f} of {len(captions)} captions are word for word the given ones,")
        print(f"{count / len(test):.3f} would be with {most_frequent!r} for all; in {folder / FILE}.")
        for sample in record["details"]["samples"][:4]:
            print(f"  {sample['given']!r}: {sample['written']!r}")
        print("\nTo use the captioner:\n\n" + LOADING_SNIPPET.format(folder=folder))
    accelerator.wait_for_everyone()
    return record


def prepare_captioning(
    model_name: str, arguments: CaptioningArguments, accelerator: Accelerator
) -> tuple[PreparedTask, "Tester"]:
    """Return a captioner and its data, ready for a step, and what measures it.

    Raises:
        InputError: No such data or model.
    """
    train, test = load_captioning(arguments)
    tokenizer = build_tokenizer(train.annotations, arguments.vocab_size)
    model, processor = build_captioner(model_name, tokenizer, arguments)
    train, test = read_for(processor, train), read_for(processor, test)
    tester = Tester(model, processor, tokenizer, test, accelerator, arguments)
    task = PreparedTask(
        model,
        processor,
        train,
        test,
        CaptionedViews(train, tokenizer, processor, arguments),
        collate,
        partial(model_inputs, processor),
        lambda name: learning_rate_scale(name, arguments.encoder_learning_rate_ratio),
        lambda: tester.measure()[0],
        weights_digest(model),
        companions=(tokenizer,),
        facts={"text_column": arguments.text_column_name},
    )
    return task, tester


class Tester:
    """Writes captions for the test images, an equal share on each process."""

    def __init__(
        self,
        model: VisionEncoderDecoderModel,
        processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerFast,
        images: AnnotatedImages,
        accelerator: Accelerator,
        arguments: CaptioningArguments,
    ):
        self.model, self.processor, self.tokenizer, self.images = model, processor, tokenizer, images
        self.accelerator, self.batch_size = accelerator, arguments.per_device_eval_batch_size
        self.tokens = caption_tokens(tokenizer, images.annotations, arguments.max_target_length)

    @torch.no_grad()
    def measure(self) -> tuple[dict[str, float], dict[int, str]]:
        """Return figures, and the captions by index of the image; every process must call.

        `exact_match` is the share of captions equal to the given ones, `loss` the mean over images of the mean over
        tokens of the given captions, in nats.

        Raises:
            InputError: Not one image can be read.
        """
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        indices = list(range(rank, len(self.images), processes))
        found: list[tuple[int, str, float]] = []
        self.model.eval()
        for start in range(0, len(indices), self.batch_size):
            read = [(index, self.images.source.read(index)) for index in indices[start : start + self.batch_size]]
            kept = [index for index, image in read if image is not None]
            if not kept:
                continue
            images, axes = arrays_of([image for _, image in read if image is not None])
            pixels = self.processor(images, return_tensors="pt", **axes)["pixel_values"].to(self.accelerator.device)
            written = self.tokenizer.batch_decode(
                self.model.generate(pixels, do_sample=False), skip_special_tokens=True
            )
            labels = padded([self.tokens[index] for index in kept]).to(pixels.device)
            logits = self.model(pixel_values=pixels, **label_inputs(labels)).logits.float()
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            losses = losses.sum(1) / (labels >= 0).sum(1)
            found += zip(kept, written, losses.tolist(), strict=True)
        if processes > 1:
            found = gather_object(found)
        if not found:
            raise InputError(
                f"`test_split`: expected readable images in {self.images.split!r}, all are corrupt; check them."
            )
        # as training does with the captions, so that a blank more or less is no difference
        captions = {index: " ".join(text.split()) for index, text, _ in found}
        right = sum(text == self.images.annotations[index] for index, text in captions.items())
        loss = sum(loss for _, _, loss in found) / len(found)
        return {"exact_match": right / len(captions), "loss": loss}, captions
