"""A device that runs out of memory in a step: the step is taken again in halves, on all processes, and is not lost."""

import time

import pytest
import torch

from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.training.engine.pretraining import pretraining_loop
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.images.run_images import load_images
from hf_vicreg.training.launch.distributed import build_accelerator
from hf_vicreg.training.launch.signals import StopRequest
from hf_vicreg.training.monitor.run_log import LOG_FILE, read_log
from hf_vicreg.training.run.processors import build_processor
from hf_vicreg.training.run.resolve import resolve

RESNET = {"model_type": "resnet", "hidden_sizes": [16, 32], "depths": [1, 1], "embedding_size": 16}


def _trainer(recipe, folder, images, **more):
    settings = recipe | {"train_dir": str(images), "output_dir": str(folder), "batch_size": 8, "max_steps": 4} | more
    config = resolve(settings)
    accelerator = build_accelerator("no", device="cpu")
    torch.manual_seed(0)
    model = VicRegForPreTraining(config.vicreg)
    source, _, _ = load_images(config)
    assert build_processor(config).size["height"] == config.image_size[0]
    folder.mkdir()
    return pretraining_loop(config, source, model, accelerator, None, StopRequest(folder, None))


def _full_above(trainer, most, calls):
    """Let the encoder run out of memory for more than `most` images at once, as a full device would."""

    def refuse(module, arguments, keywords):
        pixels = keywords["pixel_values"] if "pixel_values" in keywords else arguments[0]
        calls.append(len(pixels))
        if len(pixels) > 2 * most:  # two views
            raise torch.OutOfMemoryError("tried to allocate more than there is")

    trainer.step.model.encoder.register_forward_pre_hook(refuse, with_kwargs=True)


def _losses(trainer):
    return [record["loss"] for record in read_log(trainer.folder / LOG_FILE)]


def test_a_full_device_changes_nothing_but_the_pieces(tiny_recipe, tmp_path, image_folder, caplog):
    tiny_recipe["model"]["drop_path_rate"] = 0.0  # drawn for each piece
    images = image_folder(16)
    plain = _trainer(tiny_recipe, tmp_path / "plain", images)
    plain.fit()
    full, calls = _trainer(tiny_recipe, tmp_path / "full", images), []
    _full_above(full, 3, calls)
    state = full.fit()
    assert state.step == 4
    assert state.skipped_steps == 0
    assert full.step.splits == 4
    assert calls[:3] == [16, 8, 4], "halved until it fits"
    assert max(calls[3:]) == 4, "and not tried in vain again"
    assert sum("ran out of memory" in one.message for one in caplog.records) == 2
    assert _losses(full) == pytest.approx(_losses(plain), rel=1e-3)


def test_memory_lost_on_the_way_back_is_no_loss_either(tiny_recipe, tmp_path, image_folder):
    tiny_recipe["model"]["drop_path_rate"] = 0.0
    images = image_folder(16)
    plain = _trainer(tiny_recipe, tmp_path / "plain", images, max_steps=1)
    plain.fit()
    full, left = _trainer(tiny_recipe, tmp_path / "full", images, max_steps=1), [1]

    def refuse(module, arguments, output):
        def once(gradient):
            if left and left.pop():
                raise torch.OutOfMemoryError("full on the way back")

        if output.pooler_output.requires_grad:
            output.pooler_output.register_hook(once)

    full.step.model.encoder.register_forward_hook(refuse)
    full.fit()
    assert full.step.splits == 2
    assert _losses(full) == pytest.approx(_losses(plain), rel=1e-5)
    # the step that was broken off had moved the expander's running statistics already
    means = dict(plain.step.model.named_buffers())
    for name, buffer in full.step.model.named_buffers():
        torch.testing.assert_close(buffer, means[name], rtol=1e-4, atol=1e-6)


def test_one_image_too_much_ends_the_run_in_one_line(tiny_recipe, tmp_path, image_folder):
    trainer = _trainer(tiny_recipe, tmp_path / "run", image_folder(16))
    _full_above(trainer, 0, [])
    with pytest.raises(InputError, match=r"`batch_size`: expected 1 image\(s\) of one device to fit"):
        trainer.fit()


def test_batch_norms_cannot_be_split(tiny_recipe, tmp_path, image_folder):
    tiny_recipe |= {"model": RESNET, "views": {"image_size": 32}}
    trainer = _trainer(tiny_recipe, tmp_path / "run", image_folder(16))
    _full_above(trainer, 0, [])
    with pytest.raises(InputError, match=r"`batch_size`: expected 8 image\(s\)"):
        trainer.fit()


def test_a_run_that_fails_has_written_its_checkpoint_when_it_says_so(tiny_recipe, tmp_path, image_folder):
    trainer, written = _trainer(tiny_recipe, tmp_path / "run", image_folder(16)), []

    def fail(module, arguments):
        trainer.background.start(lambda: (time.sleep(0.3), written.append("checkpoint")))
        raise InputError("`images`: broken")

    trainer.step.model.encoder.register_forward_pre_hook(fail)
    with pytest.raises(InputError, match="broken"):
        trainer.fit()
    assert written == ["checkpoint"]
