"""Whether a checkpoint is this run's."""

import pytest

from hf_vicreg.training.engine.checkpoint import RunState
from hf_vicreg.training.engine.resume import refuse_other_configuration
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.run.resolve import resolve


@pytest.fixture
def recipe():
    """Returns a function that gives a run's recipe."""

    def make(**changes):
        return resolve({"output_dir": "out", "train_dir": "images", "max_steps": 5} | changes).to_recipe()

    return make


def state(recipe, fingerprint="a"):
    return RunState(recipe=recipe, data_fingerprint=fingerprint)


def test_what_is_computed_may_not_change_and_how_it_is_watched_may(recipe):
    refuse_other_configuration(state(recipe()), state(recipe()))
    refuse_other_configuration(state(recipe()), state(recipe(logging_steps=3, train_dir="elsewhere", max_time=5)))
    differences = r"`learning_rate` is 0.1, the checkpoint has 0.0005; `model.hidden_size` is 96, the checkpoint"
    with pytest.raises(InputError, match=differences) as caught:
        refuse_other_configuration(state(recipe()), state(recipe(learning_rate=0.1, model={"hidden_size": 96})))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="the images are not the ones it was trained on"):
        refuse_other_configuration(state(recipe(), "b"), state(recipe()))


def test_a_checkpoint_from_before_a_flag_was_there_had_its_default(recipe):
    old = {key: value for key, value in recipe().items() if key != "streaming"}
    refuse_other_configuration(state(old), state(recipe()))
    with pytest.raises(InputError, match="`streaming` is True, the checkpoint has False"):
        refuse_other_configuration(
            state(old), state(recipe(streaming=True, train_dir=None, dataset_name="some/images"))
        )
