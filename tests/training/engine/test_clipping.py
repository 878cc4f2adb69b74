"""The norm by which a gradient is clipped, and which the log shows."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.training.engine.pretraining import pretraining_loop
from hf_vicreg.training.engine.unseen import unseen_parameters
from hf_vicreg.training.images.run_images import load_images
from hf_vicreg.training.launch.distributed import build_accelerator, read_once
from hf_vicreg.training.launch.signals import StopRequest
from hf_vicreg.training.monitor.run_log import LOG_FILE, read_log
from hf_vicreg.training.run.resolve import resolve


def test_what_the_optimiser_leaves_alone_does_not_count(tiny_recipe, tmp_path, image_folder):
    """With a scaler nothing else is unscaled: rounding noise would count 65,536 times."""
    images, norms = image_folder(16), []
    for factor in (1.0, 1e9):
        folder = tmp_path / str(factor)
        settings = {"train_dir": str(images), "output_dir": str(folder), "batch_size": 8, "max_steps": 2}
        config = resolve(tiny_recipe | settings)
        accelerator = build_accelerator("no", device="cpu")
        torch.manual_seed(0)
        model = VicRegForPreTraining(config.vicreg)
        unseen = unseen_parameters(model)
        assert "encoder.layernorm.bias" in unseen
        for parameter in unseen.values():
            parameter.register_hook(lambda gradient, factor=factor: gradient + factor)
        folder.mkdir()
        loop = pretraining_loop(config, load_images(config)[0], model, accelerator, None, StopRequest(folder, None))
        loop.fit()
        norms.append([record["grad_norm"] for record in read_log(folder / LOG_FILE)])
    assert norms[0] == norms[1]
    assert max(norms[0]) < 1e6


def test_the_norm_of_no_gradient_is_read_with_what_lies_on_a_gpu():
    """While encoders wait for their expander they have no gradient, and torch puts the norm of nothing on the CPU."""
    norm = torch.nn.utils.clip_grad_norm_([torch.nn.Parameter(torch.ones(2))], 1.0)
    assert norm.device.type == "cpu"
    accelerator = build_accelerator("no", device="cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):  # the devices of a GPU, and no values
        judged = torch.zeros(2, dtype=torch.bool, device="cuda")
        with pytest.raises(DataDependentOutputException):  # it comes to the reading itself
            read_once([*judged, 1], [norm], accelerator)
