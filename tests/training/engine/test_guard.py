"""Which steps are left out, what they leave behind, and when they end a run."""

import math

import pytest
import torch

from hf_vicreg import VicRegConfig, VicRegForPreTraining
from hf_vicreg.training.engine.checkpoint import RunState
from hf_vicreg.training.engine.guard import StepGuard, Verdict
from hf_vicreg.training.errors import InputError

RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}


def test_whatever_is_not_finite_is_skipped():
    guard = StepGuard(torch.nn.Linear(1, 1), 3)
    assert guard.judge(True, True) == Verdict.TAKE
    assert guard.judge(False, True) == Verdict.SKIP
    assert guard.judge(True, False) == Verdict.SKIP


def test_a_skipped_step_leaves_no_trace_in_batch_norms():
    model = VicRegForPreTraining(VicRegConfig(encoder=RESNET, expander_sizes=[8, 8])).train()
    views = torch.randn(4, 2, 3, 32, 32)
    guard, state = StepGuard(model, 3), RunState()
    for pixel, allowed in ((0.0, True), (math.inf, False), (0.0, True)):
        guard.begin()
        before = {name: one.clone() for name, one in model.named_buffers()}
        views[0, 0, 0, 0, 0] = pixel
        loss = model(pixel_values=views).loss.item()
        moved = [name for name, one in model.named_buffers() if not torch.equal(one, before[name])]
        assert moved
        assert guard.allows(guard.judge(math.isfinite(loss), True), state, learning_rate=1e-3) == allowed
        if not allowed:
            assert all(torch.equal(one, before[name]) for name, one in model.named_buffers())
        assert all(one.isfinite().all() for one in model.buffers())
    assert state.skipped_steps == 1


def test_only_steps_in_a_row_end_a_run():
    guard, state = StepGuard(torch.nn.Linear(1, 1), 2), RunState()
    for verdict in (Verdict.SKIP, Verdict.TAKE, Verdict.SKIP):
        assert guard.allows(verdict, state, learning_rate=0.1) == (verdict == Verdict.TAKE)
    with pytest.raises(InputError, match=r"`learning_rate`: .* not finite for 2 steps in a row; lower it from 0.1"):
        guard.allows(Verdict.SKIP, state, learning_rate=0.1)
    assert state.skipped_steps == 3


def test_overflows_of_fp16_lower_the_scale_and_do_not_count_until_it_is_below_1():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    guard, state = StepGuard(net, 1, scaler), RunState()
    scales = []
    for _ in range(3):
        scaler.scale(net(torch.randn(8, 3)).sum() * math.inf).backward()
        scaler.unscale_(optimizer)
        assert guard.judge(True, False) == Verdict.OVERFLOW
        assert not guard.allows(Verdict.OVERFLOW, state, learning_rate=0.1)
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    assert scales == [2.0, 1.0, 0.5]
    assert state.skipped_steps == 0
    assert guard.judge(True, False) == Verdict.SKIP
    assert guard.judge(False, True) == Verdict.SKIP
