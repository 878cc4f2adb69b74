"""Parameter groups and the learning rate."""

from itertools import pairwise

import pytest
import torch

from hf_vicreg import VicRegConfig, VicRegForPreTraining
from hf_vicreg.training.optim import build_optimizer, learning_rate_at, parameter_groups

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 16}


def test_learning_rate_warms_up_and_follows_a_cosine():
    rates = [learning_rate_at(step, 100, 2.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0)
    assert 0 < rates[99] < 0.002
    assert all(later <= earlier for earlier, later in pairwise(rates[10:]))
    assert learning_rate_at(0, 1, 1.0, 0.0) == 1.0


def test_only_matrices_decay():
    model = VicRegForPreTraining(
        VicRegConfig(
            encoder=TINY | {"num_register_tokens": 2, "position_embedding_type": "absolute"}, expander_sizes=[8, 8]
        )
    )
    decayed, exempt = (group["params"] for group in parameter_groups(model, 0.05))
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert len(decayed) + len(exempt) == len(names)
    exempt_names = {names[parameter] for parameter in exempt}
    learned = {f"encoder.embeddings.{name}" for name in ("cls_token", "register_tokens", "position_embeddings")}
    assert learned <= exempt_names
    assert all(names[parameter].endswith("weight") and parameter.ndim >= 2 for parameter in decayed)
    optimizer = build_optimizer(model, 1e-3, 0.05, (0.9, 0.95))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
