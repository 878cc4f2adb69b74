"""A batch in pieces against the whole of it: gradients, random numbers, processes."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_vicreg import VicRegConfig, VicRegForPreTraining
from hf_vicreg.modeling.bigbird_blocks import BigBirdViTDropPath
from hf_vicreg.training.engine.two_pass import two_pass_backward

WORKER = Path(__file__).with_name("worker_two_pass.py")
specification = importlib.util.spec_from_file_location("worker_two_pass", WORKER)
worker = importlib.util.module_from_spec(specification)
specification.loader.exec_module(worker)


def in_pieces(model, batch, count):
    outputs = two_pass_backward(
        model, [lambda piece=piece: piece for piece in worker.split(batch, count)], torch.Tensor.backward
    )
    return outputs.loss.item(), worker.gradient(model)


def whole(model, batch):
    outputs = model(**batch)
    outputs.loss.backward()
    return outputs.loss.item(), worker.gradient(model)


@pytest.mark.parametrize("num_local", [0, 2], ids=["two-views", "multi-crop"])
@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_pieces_have_the_gradient_of_the_whole_batch(norm, count, num_local):
    batch = worker.images(num_local)
    loss, expected = whole(worker.build_model(norm), batch)
    found_loss, found = in_pieces(worker.build_model(norm), batch, count)
    assert found_loss == pytest.approx(loss, rel=1e-12)
    assert (found - expected).norm() <= 1e-10 * expected.norm()
    # what is common instead, the mean of the pieces' own losses, is another gradient
    model = worker.build_model(norm)
    for piece in worker.split(batch, count):
        (model(**piece).loss / count).backward()
    assert (worker.gradient(model) - expected).norm() > 0.05 * expected.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_pieces_have_the_gradient_of_the_whole_batch_with_the_same_dropped_paths(dtype, tolerance):
    batch = {name: one.to(dtype) for name, one in worker.images().items()}
    count, masks = 4, {}

    def model():
        return worker.build_model("layer", drop_path_rate=0.4).to(dtype)

    def note(name, module, args, output):
        masks.setdefault(name, []).append((output != 0).flatten(1).any(1))

    def replay(name, module, args, output):
        kept = torch.cat([one.chunk(2)[0] for one in masks[name][:count]])
        other = torch.cat([one.chunk(2)[1] for one in masks[name][:count]])
        kept = torch.cat([kept, other])[:, None, None]  # views of one size go through the encoder together
        del masks[name][:count]
        return args[0] * kept / (1 - module.rate)

    pieces, one_batch = model(), model()
    for some, hook in ((pieces, note), (one_batch, replay)):
        for name, module in some.named_modules():
            if isinstance(module, BigBirdViTDropPath) and module.rate:
                # called twice in a layer: `name` and the turn together say which
                turn = iter(range(10_000))
                module.register_forward_hook(
                    lambda *call, name=name, hook=hook, turn=turn: hook((name, next(turn) % 2), *call)
                )
    torch.manual_seed(5)
    loss, found = in_pieces(pieces, batch, count)
    assert all(len(calls) == 2 * count for calls in masks.values())
    for calls in masks.values():  # the second pass drops what the first one did
        assert all(torch.equal(*pair) for pair in zip(calls[:count], calls[count:], strict=True))
    assert not all(mask.all() for calls in masks.values() for mask in calls)
    expected_loss, expected = whole(one_batch, batch)
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    assert (found - expected).norm() <= tolerance * expected.norm()


def test_the_second_pass_is_the_first_bit_for_bit():
    model = worker.build_model("batch", drop_path_rate=0.3, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    seen = []
    model.encoder.register_forward_hook(lambda _, args, output: seen.append(output.pooler_output.detach().clone()))
    in_pieces(model, worker.images(), 3)
    first, second = seen[:3], seen[3:]
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert not torch.equal(first[0], model(**worker.split(worker.images(), 3)[0], return_loss=False).representations)
    # and the generator goes on where one pass would have left it
    torch.manual_seed(2)
    in_pieces(model, worker.images(), 2)
    after = torch.rand(1)
    torch.manual_seed(2)
    for piece in worker.split(worker.images(), 2):
        model(**piece, return_loss=False)
    assert torch.equal(torch.rand(1), after)


def test_a_frozen_encoder_needs_no_second_pass():
    batch = worker.images()
    for frozen in (True, False):
        models = [worker.build_model("layer") for _ in range(2)]
        for model in models:
            model.encoder.requires_grad_(not frozen)
        (_, expected), (_, found) = whole(models[0], batch), in_pieces(models[1], batch, 3)
        assert (found - expected).norm() <= 1e-10 * expected.norm()
    assert len(expected) > len(torch.cat([one.flatten() for one in models[0].expander.parameters()]))


def test_encoders_with_batch_norms_are_refused():
    resnet = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    model = VicRegForPreTraining(VicRegConfig(encoder=worker.ENCODER, second_encoder=resnet, expander_sizes=[8, 8]))
    with pytest.raises(ValueError, match=r"`statistics_batch_size`: .* without batch norms, .*, got 'resnet'"):
        two_pass_backward(model, [dict, dict], torch.Tensor.backward)
    with pytest.raises(ValueError, match="`pieces`: expected at least one"):
        two_pass_backward(model, [], torch.Tensor.backward)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_pieces_of_several_processes_have_the_gradient_of_one_batch(world_size, ranks, tmp_path):
    output = tmp_path / "results.safetensors"
    finished = ranks(world_size, WORKER, world_size, output)
    assert finished.returncode == 0, finished.stderr[-3000:]
    results = load_file(output)
    assert results["world_size"] == world_size
    for norm, width in worker.EXPANDERS:
        loss, expected = whole(worker.build_model(norm, width), worker.images(num_local=2))
        assert results[f"{norm}_loss"].item() == pytest.approx(loss, rel=1e-12)
        assert (results[f"{norm}_gradient"] - expected).norm() <= 1e-10 * expected.norm()
