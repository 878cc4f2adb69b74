"""transformers' ModelTesterMixin and BackboneTesterMixin on our models, in several layouts, positions and grids."""

import tempfile
import unittest

import pytest
import torch
from own_skips import ENCODER, MAE, VICREG, OwnSkips
from testers import BigBirdViTTester, MAETester, MaskedImageTester, VicRegTester
from torch import nn
from transformers.models.auto import modeling_auto
from transformers_upstream.test_backbone_common import BackboneTesterMixin
from transformers_upstream.test_modeling_common import ModelTesterMixin

from hf_vicreg import (
    BigBirdViTBackbone,
    BigBirdViTConfig,
    BigBirdViTForImageClassification,
    BigBirdViTForMaskedImageModeling,
    BigBirdViTMAEForPreTraining,
    BigBirdViTModel,
    VicRegForPreTraining,
)
from hf_vicreg.modeling import bigbird_attention

pytestmark = pytest.mark.upstream

# The mixins know by these names what a class is for, and so which labels it takes. `register` does not add to them.
modeling_auto.MODEL_MAPPING_NAMES["bigbird_vit"] = "BigBirdViTModel"
modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES["bigbird_vit"] = "BigBirdViTBackbone"
modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["bigbird_vit"] = "BigBirdViTForImageClassification"
modeling_auto.MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES["bigbird_vit"] = "BigBirdViTForMaskedImageModeling"
modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES["bigbird_vit_mae"] = "BigBirdViTMAEForPreTraining"
modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES["vicreg"] = "VicRegForPreTraining"


class ModelCase(OwnSkips, ModelTesterMixin):
    """What all test cases here share."""

    test_can_init_all_missing_weights_before_2023 = True  # it is on for newer files only, by a line they start with
    make_tester = BigBirdViTTester
    arguments: dict = {}  # noqa: RUF012  replaced, never changed

    def setUp(self):
        self.model_tester = self.make_tester(self, **self.arguments)
        super().setUp()

    def test_model_get_set_embeddings(self):
        """The layer that pixels enter first is a convolution, where upstream expects a table of tokens."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            assert isinstance(model.get_input_embeddings(), nn.Conv2d)
            replacement = nn.Conv2d(3, self.model_tester.hidden_size, 1)
            model.set_input_embeddings(replacement)
            assert model.get_input_embeddings() is replacement
            assert model.get_output_embeddings() is None


class EncoderCase(ModelCase):
    all_model_classes = (BigBirdViTModel, BigBirdViTForImageClassification, BigBirdViTBackbone)
    own_skips = ENCODER


class TestTilesRotary(EncoderCase, unittest.TestCase):
    """Tiles that do not fit the grid, rotary positions, no registers: close to the defaults."""


class TestRasterAbsolute(EncoderCase, unittest.TestCase):
    """BigBird's own blocks on a square grid, a table of positions, registers, CLS pooling."""

    arguments = {  # noqa: RUF012
        "grid": (6, 6),
        "patch_size": 4,
        "attention_layout": "raster",
        "block_size": 5,
        "position_embedding_type": "absolute",
        "num_register_tokens": 2,
        "pooling": "cls",
        "pooler_act": "tanh",
        "layerscale_value": 0.5,
        "hidden_dropout_prob": 0.1,
    }


class TestTilesAbsoluteByBlocks(EncoderCase, unittest.TestCase):
    """Attention by blocks, which such small grids do not get by themselves; padding, global tiles, a gated MLP."""

    additional_model_inputs = ("pixel_mask",)
    arguments = {  # noqa: RUF012
        "grid": (8, 8),
        "padded": True,
        "position_embedding_type": "absolute",
        "num_global_tiles": 1,
        "num_register_tokens": 1,
        "use_swiglu_ffn": True,
        "drop_path_rate": 0.1,
    }

    def setUp(self):
        super().setUp()
        for cost in ("PAIR_COST", "TILE_COST"):
            self.addCleanup(setattr, bigbird_attention, cost, getattr(bigbird_attention, cost))
            setattr(bigbird_attention, cost, 0)


class TestRasterRotary(EncoderCase, unittest.TestCase):
    """Raster blocks that do not divide the grid, rotary positions, a register."""

    arguments = {"attention_layout": "raster", "block_size": 8, "num_register_tokens": 1}  # noqa: RUF012


class TestMaskedImages(ModelCase, unittest.TestCase):
    """SimMIM's head."""

    all_model_classes = (BigBirdViTForMaskedImageModeling,)
    make_tester = MaskedImageTester
    arguments = {"num_register_tokens": 1}  # noqa: RUF012
    own_skips = ENCODER

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if "bool_masked_pos" in inputs:
            inputs["bool_masked_pos"][:, ::2] = 1  # upstream masks nothing: a loss without gradients
        return inputs


class EncoderWithin(ModelCase):
    """Models around an encoder, under the name `encoder`."""

    _is_composite = True

    def test_correct_missing_keys(self):
        """An encoder's checkpoint lacks the rest alone; the wrapper's configuration is not in it, so it is given."""
        config, (model_class,) = self.model_tester.get_config(), self.all_model_classes
        with tempfile.TemporaryDirectory() as folder:
            encoder = model_class(config).encoder
            encoder.save_pretrained(folder)
            model, info = model_class.from_pretrained(folder, config=config, output_loading_info=True)
        assert info["missing_keys"] == {name for name in model.state_dict() if not name.startswith("encoder.")}
        for name, tensor in encoder.state_dict().items():
            torch.testing.assert_close(tensor, model.encoder.state_dict()[name])


class TestMAE(EncoderWithin, unittest.TestCase):
    """A masked autoencoder around the encoder."""

    all_model_classes = (BigBirdViTMAEForPreTraining,)
    make_tester = MAETester
    own_skips = MAE


class TestVicReg(EncoderWithin, unittest.TestCase):
    """VICReg around the encoder, batch norm in the expander."""

    all_model_classes = (VicRegForPreTraining,)
    make_tester = VicRegTester
    own_skips = VICREG

    def test_batching_equivalence(self):
        """Embeddings do not depend on the batch in evaluation; upstream's batch of one has no covariance."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = VicRegForPreTraining(config).eval()
        with torch.no_grad():
            whole, part = model(**inputs), model(inputs["pixel_values"][:2])
        torch.testing.assert_close(whole.embeddings[:2], part.embeddings, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(whole.representations[:2], part.representations, atol=1e-5, rtol=1e-5)


class TestBackbone(BackboneTesterMixin, unittest.TestCase):
    """The backbone's own mixin."""

    all_model_classes = (BigBirdViTBackbone,)
    config_class = BigBirdViTConfig

    def setUp(self):
        self.model_tester = BigBirdViTTester(self, num_register_tokens=1)


@pytest.mark.parametrize("case", [TestTilesRotary, TestRasterAbsolute, TestTilesAbsoluteByBlocks, TestMAE, TestVicReg])
def test_every_own_skip_names_a_test(case):
    """A test that upstream renamed or dropped leaves no skip behind."""
    tests = [name for name in dir(case) if name.startswith("test_")]
    assert [name for name in case.own_skips if not any(test.startswith(name) for test in tests)] == []
