"""A model of images and texts to measure with: loaded, and what it makes of both."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from huggingface_hub.errors import StrictDataclassError
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from hf_vicreg.modeling.modeling_vicreg_dual_encoder import VicRegDualEncoder
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.encoder import load_config, load_processor, load_weights, no_model, source_for
from hf_vicreg.training.evaluation.features import BATCH_SIZE, encoded_batches
from hf_vicreg.training.images.image_source import ImageSource
from hf_vicreg.training.texts.captions import tokenised
from hf_vicreg.training.texts.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Dual:
    """A model of images and texts, with what prepares both.

    Attributes:
        model: In evaluation mode.
        processor: Of images.
        tokenizer: Of texts.
    """

    model: VicRegDualEncoder
    processor: BaseImageProcessor
    tokenizer: PreTrainedTokenizerBase

    def images(self, source: ImageSource, accelerator: Accelerator | None = None) -> tuple[list[int], torch.Tensor]:
        """Return the indices of the readable images and their embeddings `(images, dimensions)` on the CPU.

        With an accelerator each process encodes a share; every one must call.
        """
        source = source_for(self.processor, source)
        share = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        parts = [
            (indices, features)
            for _, indices, features in encoded_batches(source, self.processor, self.pixels, share=share)
        ]
        if share[1] > 1:
            parts = sorted(gather_object(parts), key=lambda part: part[0])
        if not parts:
            raise InputError(f"`test_split`: expected readable images in {source.name}, all are corrupt; check them.")
        return [index for indices, _ in parts for index in indices], torch.cat([one for _, one in parts])

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the embeddings of texts `(texts, dimensions)` on the CPU; long ones are cut."""
        config = self.model.config.text_config
        longest = getattr(config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        captions = tokenised([[one] for one in texts], self.tokenizer, config, longest)
        found = []
        for start in range(0, len(texts), BATCH_SIZE):
            batch = captions.batch([one for (one,) in captions.tokens[start : start + BATCH_SIZE]])
            on_device = {name: one.to(self.model.device) for name, one in batch.items()}
            found.append(self.model.get_text_features(**on_device).pooler_output.float().cpu())
        return torch.cat(found)

    def pixels(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the embeddings `(images, dimensions)` of `pixel_values`."""
        return self.model.get_image_features(pixel_values.to(self.model.device)).pooler_output


def load_dual(name: str) -> Dual:
    """Return the model of images and texts in a folder or on the Hub.

    Raises:
        InputError: None there, or one of another kind.
    """
    config = load_config(name)
    if config.model_type != VicRegDualEncoder.config_class.model_type:
        raise InputError(
            f"`MODEL`: expected a model of images and texts, of a run with --caption_column, got {name!r} of type "
            f"{config.model_type!r}."
        )
    try:
        model, info = load_weights(VicRegDualEncoder, name)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise no_model(name, error) from error
    if info["missing_keys"]:
        raise InputError(f"`MODEL`: expected weights for the whole model in {name}, {len(info['missing_keys'])} lack.")
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return Dual(model, load_processor(name, config), load_tokenizer(name, "MODEL"))
