"""What a step that is not finite leaves behind: nothing but a count."""

import math

import pytest
import torch

from hf_vicreg import VicRegConfig, VicRegForPreTraining
from hf_vicreg.training.checkpoint import RunState
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.guard import MAX_SKIPPED_IN_A_ROW, FiniteGuard

RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}


def test_a_skipped_step_leaves_no_trace_in_batch_norms():
    model = VicRegForPreTraining(VicRegConfig(encoder=RESNET, expander_sizes=[8, 8])).train()
    views = torch.randn(4, 2, 3, 32, 32)
    guard, state = FiniteGuard(model), RunState()
    for pixel, allowed in ((0.0, True), (math.inf, False), (0.0, True)):
        guard.begin()
        before = {name: one.clone() for name, one in model.named_buffers()}
        views[0, 0, 0, 0, 0] = pixel
        loss = model(pixel_values=views).loss.item()
        moved = [name for name, one in model.named_buffers() if not torch.equal(one, before[name])]
        assert moved
        assert guard.allows(loss, 1.0, state=state, learning_rate=1e-3) == allowed
        if not allowed:
            assert all(torch.equal(one, before[name]) for name, one in model.named_buffers())
        assert all(one.isfinite().all() for one in model.buffers())
    assert state.skipped_steps == 1


def test_a_run_of_skipped_steps_ends_with_advice():
    guard, state = FiniteGuard(torch.nn.Linear(1, 1)), RunState()
    for number in (math.nan, math.inf, 1.0):  # a finite step begins the count anew
        guard.allows(number, 1.0, state=state, learning_rate=0.5)
    for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
        assert not guard.allows(1.0, math.nan, state=state, learning_rate=0.5)
    with pytest.raises(InputError, match=f"not finite for {MAX_SKIPPED_IN_A_ROW} steps in a row; lower it from 0.5"):
        guard.allows(1.0, math.nan, state=state, learning_rate=0.5)
    assert state.skipped_steps == MAX_SKIPPED_IN_A_ROW + 2
