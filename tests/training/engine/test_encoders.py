"""How a run's encoders are set up: which form of attention, and what is refused."""

import pytest
import torch

from hf_vicreg import VicRegConfig, VicRegForPreTraining
from hf_vicreg.training.engine.encoders import set_up_encoders
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.run.flags import parse_flags
from hf_vicreg.training.run.resolve import resolve

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32}
OFF = {"gradient_checkpointing": False, "torch_compile": False}


def wrapper(**fields):
    return VicRegForPreTraining(VicRegConfig(encoder=TINY, expander_sizes=[8], **fields))


def test_a_flag_chooses_the_form_of_attention():
    given = parse_flags(["--attn_implementation", "eager", "--output_dir", "x", "--dataset_name", "digits"])
    run = resolve(given).run
    model = wrapper(second_encoder={"model_type": "vit", **TINY})
    set_up_encoders(model, **OFF, attn_implementation=run.attn_implementation)
    assert [one.config._attn_implementation for one in model.encoders] == ["eager", "eager"]
    set_up_encoders(model := wrapper(), **OFF)
    assert model.encoder.config._attn_implementation == "sdpa"


def test_the_wrapper_takes_every_implementation():
    model = wrapper()
    for name in ("flex_attention", "eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.encoder.config._attn_implementation == name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash_attention_2", "expected one of auto, eager, sdpa, flex_attention, got 'flash_attention_2'"),
        ("flex_attention", "expected 'sdpa' or 'eager' for training on a CPU, got 'flex_attention'"),
    ],
)
def test_forms_that_cannot_train_here_are_refused(name, message):
    with pytest.raises(InputError, match=f"`attn_implementation`: {message}"):
        set_up_encoders(wrapper(), **OFF, attn_implementation=name)
