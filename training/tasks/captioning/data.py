"""Images with captions: checked, and as training samples."""

import random
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import BaseImageProcessor, PreTrainedTokenizerFast

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.order import MAX_SUBSTITUTES
from hf_vicreg.training.images.views import ViewSampler
from hf_vicreg.training.run.arguments import ViewsConfig
from hf_vicreg.training.tasks.arguments import CaptioningArguments
from hf_vicreg.training.tasks.classification.data import image_size_of, pixel_values
from hf_vicreg.training.tasks.data import AnnotatedImages, first_readable, load_annotated

IGNORED = -100  # a label that the loss leaves out


def load_captioning(arguments: CaptioningArguments) -> tuple[AnnotatedImages, AnnotatedImages]:
    """Return the training and the test split, annotated with one caption an image, white space made single.

    Raises:
        InputError: A row without a caption, and what `load_annotated` refuses.
    """
    (train, _), (test, _) = load_annotated(arguments, arguments.text_column_name, "text_column_name")
    return _checked(train), _checked(test)


def _checked(images: AnnotatedImages) -> AnnotatedImages:
    for row, text in enumerate(images.annotations):
        if not isinstance(text, str) or not text.strip():
            raise InputError(
                f"`text_column_name`: expected a caption for each image, got {str(text)[:60]!r} in row {row} of "
                f"{images.split!r}."
            )
    return replace(images, annotations=[" ".join(text.split()) for text in images.annotations])


class CaptionedViews(Dataset):
    """Training samples for (epoch, index); all randomness depends on (seed, epoch, index) alone."""

    def __init__(
        self,
        images: AnnotatedImages,
        tokenizer: PreTrainedTokenizerFast,
        processor: BaseImageProcessor,
        arguments: CaptioningArguments,
    ):
        """Take what turns captions into tokens, and the processor for its image size."""
        self.images, self.seed = images, arguments.seed
        # views without colours: a caption may name them
        views = ViewsConfig(
            crop_min_ratio=arguments.crop_min_ratio,
            flip_probability=arguments.flip_probability,
            jitter_probability=0.0,
            grayscale_probability=0.0,
            blur_probability=0.0,
            solarize_probability=0.0,
        )
        self.sampler = ViewSampler.of_views(views, image_size_of(processor))[0]
        self.tokens = caption_tokens(tokenizer, images.annotations, arguments.max_target_length)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | None:
        """Return `crop` `(3, height, width)` uint8, `colours` and `labels` `(tokens,)` int64.

        An unreadable image is replaced by another one with its caption; None when too many are.
        """
        epoch, wanted = key
        substitutes = random.Random(f"{self.seed}/{epoch}/{wanted}/substitute")
        found = first_readable(self.images.source, wanted, substitutes.randrange, MAX_SUBSTITUTES)
        if found is None:
            return None
        index, image = found
        crop, colours = self.sampler(image, random.Random(f"{self.seed}/{epoch}/{wanted}/0"))
        return {"crop": crop, "colours": torch.tensor(colours), "labels": self.tokens[index]}


def caption_tokens(tokenizer: PreTrainedTokenizerFast, captions: list[str], limit: int) -> list[torch.Tensor]:
    """Return for each caption its tokens and the end, at most `limit` in all, `(tokens,)` int64."""
    encoded = tokenizer(captions, add_special_tokens=False)["input_ids"]
    return [torch.tensor([*tokens[: limit - 1], tokenizer.eos_token_id]) for tokens in encoded]


def collate(samples: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return crops and colours of one view an image, and `labels` `(batch, tokens)`; None if a sample is missing."""
    found = [sample for sample in samples if sample is not None]
    if len(found) < len(samples):
        return None
    return {
        "crops": torch.stack([sample["crop"] for sample in found])[:, None],
        "colours": torch.stack([sample["colours"] for sample in found])[:, None],
        "labels": padded([sample["labels"] for sample in found]),
    }


def padded(tokens: list[torch.Tensor]) -> torch.Tensor:
    """Return labels `(batch, tokens)`, shorter ones followed by what the loss leaves out."""
    return torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=IGNORED)


def model_inputs(processor: BaseImageProcessor, batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return what a captioner takes of a batch, on the device."""
    return {"pixel_values": pixel_values(batch, processor, device)[:, 0], **label_inputs(batch["labels"].to(device))}


def label_inputs(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return labels `(batch, tokens)` and the mask of what the decoder reads: a start, then labels but the last."""
    read = (labels[:, :-1] >= 0).to(torch.int64)
    return {"labels": labels, "decoder_attention_mask": torch.nn.functional.pad(read, (1, 0), value=1)}
