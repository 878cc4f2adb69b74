"""How much memory a step will take, told before the first one: shapes are run through the real model without numbers."""

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_vicreg.modeling.modeling_bigbird_vit import BigBirdViTModel
from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.training.config import RunConfig

OPTIMIZER_STATES = {"adamw": 2, "lars": 1}  # tensors of a parameter's size


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one process in a training step.

    Attributes:
        weights: Parameters, their gradients and the optimiser's state, fp32.
        kept: What the forward pass keeps for the backward pass.
        inputs: The batch as pixels, views on the device.
    """

    weights: int
    kept: int
    inputs: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kept + self.inputs


def step_memory(config: RunConfig, images: int, *, autocast: torch.dtype | None = None) -> StepMemory:
    """Return the memory of a step over so many images of one process at once.

    Args:
        config: The run's; encoders, expander and views.
        images: That go through the encoder at once in this process.
        autocast: Precision of the forward pass, None for full.
    """
    height, width = config.image_size
    local, side = config.views.num_local_views, config.views.local_image_size
    for encoder in (config.vicreg.encoder, config.vicreg.second_encoder):
        # tables are real tensors; made inside the mode below they would be shapes for good
        if encoder is not None and encoder.model_type == BigBirdViTModel.config_class.model_type:
            with torch.device("meta"):
                alone = BigBirdViTModel(encoder)
            for size in {(height, width), *([(side, side)] if local else [])}:
                alone.attention_patterns(*size)
    storages: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # a freed storage's address would be used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    with torch.device("meta"):
        model = VicRegForPreTraining(config.vicreg).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        if config.run.gradient_checkpointing:
            from hf_vicreg.training.encoders import set_up_encoders

            set_up_encoders(model, gradient_checkpointing=True, torch_compile=False)
        inputs = {"pixel_values": torch.empty(images, 2, 3, height, width)}
        if local:
            inputs["local_pixel_values"] = torch.empty(images, local, 3, side, side)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None),
        ):
            model(**inputs)
        parameters = sum(one.nbytes for one in model.parameters())
        pixels = sum(one.nbytes for one in inputs.values())
        for one in inputs.values():
            storages.pop(one.untyped_storage()._cdata, None)
    weights = parameters * (2 + OPTIMIZER_STATES[config.run.optim])
    return StepMemory(weights, sum(storages.values()), pixels)
