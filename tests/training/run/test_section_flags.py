"""The table of dotted flags, which the command line reads without torch, against the configurations themselves."""

import re

import pytest

from hf_vicreg import BigBirdViTConfig, VicRegConfig
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.run.arguments import RESERVED
from hf_vicreg.training.run.resolve import resolve
from hf_vicreg.training.run.section_flags import INHERITED, MODEL, VICREG
from hf_vicreg.training.run.settings import explicit_settings

SECTIONS = {"model": (MODEL, BigBirdViTConfig), "vicreg": (VICREG, VicRegConfig)}


@pytest.mark.parametrize("section", SECTIONS)
def test_table_has_the_fields_and_defaults_of_the_configuration(section):
    table, kind = SECTIONS[section]
    fields = {key: value for key, value in kind().to_dict().items() if key not in RESERVED and key[0] != "_"}
    assert table.keys() | INHERITED == fields.keys() | {"model_type"}
    assert {key: flag.default for key, flag in table.items()} == {key: fields[key] for key in table}
    documented = set(re.findall(r"^        (\w+): ", kind.__doc__, re.MULTILINE)) - RESERVED
    assert documented == table.keys() - {"model_type"}


def test_choices_of_the_table_are_those_of_the_configuration():
    for section, (table, _) in SECTIONS.items():
        for name, flag in table.items():
            choices = flag.value.split("|")
            if flag.value == flag.value.lower() and choices[0] != "true":
                for choice in choices:
                    given = {"dataset_name": "digits", "output_dir": "x", section: {name: choice}}
                    resolve(given | {"model": {"tile_size": 1} | given.get("model", {})})


def test_what_inherits_or_is_another_encoders_is_left_to_it():
    given = {"dataset_name": "digits", "model": {"problem_type": None, "id2label": {0: "a"}}}
    assert explicit_settings(given)["model"] == given["model"]
    other = {"dataset_name": "digits", "model": {"model_type": "resnet", "depths": [1]}}
    assert explicit_settings(other)["model"] == other["model"]
    with pytest.raises(InputError, match=r"`model.depths`: unknown key"):
        explicit_settings({"dataset_name": "digits", "model": {"depths": [1]}})
