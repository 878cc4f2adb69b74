"""What a run with captions is worth while it lasts: retrieval on images and captions kept apart."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn
from transformers import BaseImageProcessor

from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.modeling.modeling_vicreg_dual_encoder import VicRegDualEncoder
from hf_vicreg.training.image_text.dual import Dual
from hf_vicreg.training.image_text.retrieval import numbered, retrieval_figures
from hf_vicreg.training.images.image_source import ImageSource


class ImageTextProbe:
    """Recalls and median ranks of the branches on a fixed set; nothing of it reaches the training."""

    def __init__(
        self, test: ImageSource, processor: BaseImageProcessor, model: VicRegForPreTraining, accelerator: Accelerator
    ):
        assert test.captions is not None
        self.test, self.captions = test, test.captions
        self.processor, self.model, self.accelerator = processor, model, accelerator
        self.averages: Sequence[nn.Module] = ()  # of the branches, once there are any

    def dual(self) -> VicRegDualEncoder:
        """Return the branches as they are now, or their averages, as the model that is exported."""
        return VicRegDualEncoder.from_pretraining(self.model, self.averages or None)

    def measure(self) -> dict[str, float]:
        """Return the figures by the names of the log; every process must call.

        Raises:
            InputError: No image can be read.
        """
        modes = [module.training for module in self.model.modules()]
        dual = Dual(self.dual().eval(), self.processor, self.captions.tokenizer)
        indices, images = dual.images(self.test, self.accelerator)
        rows = [self.captions.texts[index] for index in indices]
        captions = [one for row in rows for one in row]
        texts = dual.texts(captions)
        owners = torch.tensor([place for place, row in enumerate(rows) for _ in row])
        for module, mode in zip(self.model.modules(), modes, strict=True):
            module.training = mode
        return retrieval_figures(images, texts, owners, numbered(captions))
