"""Memory told before the first step: the bytes that autograd keeps, and a batch that fits."""

from dataclasses import replace

import pytest
import torch

from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.planner.machine import Machine
from hf_vicreg.training.planner.memory import fit_memory, predicted_peak, step_memory
from hf_vicreg.training.run.resolve import resolve

RESNET = {"model_type": "resnet", "hidden_sizes": [16, 32], "depths": [1, 1], "embedding_size": 16}


def _config(tiny_recipe, **more):
    settings = tiny_recipe | {"dataset_name": "digits", "output_dir": "unused"} | more
    return resolve(settings)


def _really_kept(config, images):
    """The bytes that autograd keeps of one real forward pass."""
    torch.manual_seed(0)
    model = VicRegForPreTraining(config.vicreg).train()
    storages, alive = {}, []

    def keep(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    pixels = torch.randn(images, 2, 3, *config.image_size)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(pixel_values=pixels)
    storages.pop(pixels.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@pytest.mark.parametrize("model", [None, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("images", [3, 8])
def test_what_is_kept_is_what_autograd_keeps(tiny_recipe, model, images):
    config = _config(tiny_recipe, **({"model": model, "views": {"image_size": 40}} if model else {}))
    found = step_memory(config, images)
    assert found.encoder + found.expander == pytest.approx(_really_kept(config, images), rel=0.05)


def test_weights_are_counted_with_gradients_and_moments(tiny_recipe):
    config = _config(tiny_recipe)
    numbers = sum(one.numel() for one in VicRegForPreTraining(config.vicreg).parameters())
    assert step_memory(config, 4).weights == 16 * numbers
    assert step_memory(_config(tiny_recipe, optim="lars"), 4).weights == 12 * numbers
    # shared out by four, with weights and gradients of the expander, the largest part, as a whole
    wide = tiny_recipe | {"vicreg": {"expander_sizes": [256, 256]}}
    model = VicRegForPreTraining(_config(wide).vicreg)
    numbers, expander = (sum(one.numel() for one in part.parameters()) for part in (model, model.expander))
    assert step_memory(_config(wide, shard_weights=True), 4, processes=4).weights == 4 * numbers + 8 * expander
    two_copies = _config(wide, shard_weights=True, dp_shard_size=2)
    assert step_memory(two_copies, 4, processes=4).weights == 8 * numbers + 8 * expander
    assert step_memory(_config(wide, shard_weights=True), 4).weights == 16 * numbers


def test_captions_are_no_longer_than_their_encoder_takes(tiny_recipe):
    texts = {"model_type": "distilbert", "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    texts |= {"vocab_size": 300, "max_position_embeddings": 8}
    given = {"caption_column": ["text"], "dataset_name": "x/y", "second_model": texts}
    long, short = (step_memory(_config(tiny_recipe, **given, max_text_length=one), 4) for one in (64, 8))
    assert long == short


def test_recomputed_layers_keep_less(tiny_recipe):
    plain, again = (step_memory(_config(tiny_recipe, gradient_checkpointing=one), 16).encoder for one in (False, True))
    assert again < 0.7 * plain


def test_a_batch_too_large_for_the_memory_goes_in_parts(tiny_recipe):
    config = _config(tiny_recipe)
    memory = step_memory(config, 32)
    plenty = Machine("cpu", "", 1, 2**40)
    assert fit_memory(config, plenty)[0] is config
    whole, halves = (predicted_peak(memory, plenty, pieces) for pieces in (1, 2))
    tight = Machine("cpu", "", 1, int((whole + halves) / 2 / 0.9))
    fitted, peak = fit_memory(config, tight)
    assert (fitted.run.batch_size, fitted.run.statistics_batch_size) == (16, 32)
    assert fitted.step_size == config.step_size
    assert peak <= tight.usable_memory


def test_what_fits_in_no_way_is_refused(tiny_recipe):
    none = Machine("cpu", "", 1, 1000)
    with pytest.raises(InputError, match=r"`max_memory`: expected about .* GB .* found 0.0 GB"):
        fit_memory(_config(tiny_recipe), none)


def test_an_encoder_with_batch_norms_is_never_split(tiny_recipe):
    config = _config(tiny_recipe, model=RESNET, views={"image_size": 64})
    whole = predicted_peak(step_memory(config, 32), Machine("cpu", "", 1, 1))
    with pytest.raises(InputError, match="or batch"):
        fit_memory(config, Machine("cpu", "", 1, int(whole / 0.9) - 2**20))


def test_several_processes_share_the_batch(tiny_recipe):
    config = _config(tiny_recipe)
    one = replace(Machine("cpu", "", 1, 2**40), num_processes=1)
    two = replace(one, num_processes=2)
    assert fit_memory(config, two)[1] < fit_memory(config, one)[1]


def test_what_dinov3_caches_for_a_size_stays_real(tiny_recipe):
    # transformers keeps the coordinates of patches of a size: made among shapes they would be shapes in the run
    model = {"model_type": "dinov3_vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = _config(tiny_recipe, model=model | {"image_size": [80, 112], "intermediate_size": 48})
    assert step_memory(config, 2).encoder > 0
    encoder = VicRegForPreTraining(config.vicreg).encoder
    assert type(encoder(torch.zeros(1, 3, 80, 112)).pooler_output) is torch.Tensor


def test_frozen_layers_keep_nothing_for_the_way_back(tiny_recipe):
    tiny_recipe["model"] |= {"model_type": "bigbird_vit", "drop_path_rate": 0.0}
    plain = step_memory(_config(tiny_recipe), 16)
    frozen = step_memory(_config(tiny_recipe, model_name_or_path="a run", freeze_layers=1), 16)
    assert frozen.weights < 0.7 * plain.weights
    assert frozen.encoder < 0.7 * plain.encoder
    adapted = step_memory(_config(tiny_recipe, model_name_or_path="a run", lora_rank=1), 16)
    assert adapted.weights < 0.8 * plain.weights  # no gradient and no moments of what stays
