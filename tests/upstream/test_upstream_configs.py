"""transformers' ConfigTester on all configurations."""

import unittest

import pytest
from testers import BigBirdViTTester, MAETester, VicRegTester
from transformers_upstream.test_configuration_common import ConfigTester

from hf_vicreg import BigBirdViTConfig, BigBirdViTMAEConfig, VicRegConfig

pytestmark = pytest.mark.upstream


class TestConfigs(unittest.TestCase):
    """Saving, loading, labels, common properties, sub-configurations."""

    def test_bigbird_vit(self):
        self.model_tester = BigBirdViTTester(self)
        fields = {"hidden_size": 40, "num_attention_heads": 2, "tile_size": 4, "attention_layout": "raster"}
        ConfigTester(self, config_class=BigBirdViTConfig, has_text_modality=False, **fields).run_common_tests()

    def test_vicreg(self):
        self.model_tester = VicRegTester(self)
        fields = {"expander_sizes": [64, 32], "gamma": 2.0, "expander_norm": "layer"}
        ConfigTester(self, config_class=VicRegConfig, has_text_modality=False, **fields).run_common_tests()

    def test_mae(self):
        self.model_tester = MAETester(self)
        fields = {"decoder_num_hidden_layers": 3, "mask_ratio": 0.6, "norm_pix_loss": True}
        ConfigTester(self, config_class=BigBirdViTMAEConfig, has_text_modality=False, **fields).run_common_tests()
