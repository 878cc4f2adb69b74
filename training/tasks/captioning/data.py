"""Images with captions: checked, and as training samples."""

from dataclasses import replace
from typing import Any

import torch
from transformers import BaseImageProcessor, PreTrainedTokenizerFast

from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.order import alike
from hf_vicreg.training.tasks.arguments import CaptioningArguments
from hf_vicreg.training.tasks.classification.data import check_pixels, image_size_of, pixel_values
from hf_vicreg.training.tasks.data import AnnotatedImages, TargetViews, load_annotated

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


class CaptionedViews(TargetViews):
    """Training samples for (epoch, index), whose labels are the tokens of a caption."""

    def __init__(
        self,
        images: AnnotatedImages,
        tokenizer: PreTrainedTokenizerFast,
        processor: BaseImageProcessor,
        arguments: CaptioningArguments,
    ):
        """Take what turns captions into tokens, and the processor for its image size."""
        check_pixels(processor)
        tokens = caption_tokens(tokenizer, images.annotations, arguments.max_target_length)
        super().__init__(images.source, tokens, image_size_of(processor), arguments)


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
        "crops": torch.stack(alike([sample["crop"] for sample in found]))[:, None],
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
