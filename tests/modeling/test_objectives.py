"""Every objective against its authors' formula, over one process and several, in one pass and two."""

import importlib.util
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch import nn

from hf_vicreg import VicRegConfig
from hf_vicreg.modeling.byol import prediction_error, teacher_momentum
from hf_vicreg.modeling.masked_objectives import masked_part
from hf_vicreg.modeling.modeling_vicreg import VicRegForPreTraining
from hf_vicreg.modeling.objectives import OBJECTIVES
from hf_vicreg.modeling.sigreg import random_slices
from hf_vicreg.modeling.vicreg_loss import vicreg_loss
from hf_vicreg.modeling.vicregl import Patches, centres_in_image, map_statistics, nearest
from hf_vicreg.training.engine.two_pass import two_pass_backward


def _load(name):
    specification = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


plain, worker = _load("plain_objectives"), _load("worker_objectives")
DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)


def views_of(count, samples=7, dimensions=5, dtype=torch.float64):
    common = torch.randn(samples, dimensions, dtype=torch.float64)
    noise = torch.randn(count, samples, dimensions, dtype=torch.float64)
    return [(common + 0.5 * one).to(dtype).requires_grad_() for one in noise]


def objective(name, **settings):
    config = VicRegConfig(encoder=worker.ENCODER, expander_sizes=[8, 5], objective=name, objective_settings=settings)
    return OBJECTIVES[name](config, nn.Linear(4, 4), nn.Linear(4, 4))


def assert_same(found, expected, leaves, references, tolerance):
    assert found.item() == pytest.approx(expected.item(), rel=tolerance)
    own = torch.cat([one.flatten().double() for one in torch.autograd.grad(found, leaves, retain_graph=True)])
    other = torch.cat([one.flatten() for one in torch.autograd.grad(expected, references, retain_graph=True)])
    assert (own - other).norm() <= tolerance * other.norm()


FORMULAS = {
    "simclr": lambda views, pair: plain.nt_xent(*pair, 0.2),
    "barlow_twins": lambda views, pair: plain.barlow_twins(*pair, 0.03),
}


@DTYPES
@pytest.mark.parametrize("count", [2, 4], ids=["two-views", "multi-crop"])
@pytest.mark.parametrize("name", ["simclr", "barlow_twins", "sigreg"])
def test_loss_and_gradient_are_the_authors(name, count, dtype, tolerance):
    settings = {"simclr": {"temperature": 0.2}, "barlow_twins": {"redundancy_weight": 0.03}}
    one = objective(name, **settings.get(name, {"num_slices": 6, "sketch_weight": 0.3}))
    one.begin_step(None, 5, 10)
    views = views_of(count, dtype=dtype)
    references = [view.detach().double().requires_grad_() for view in views]
    if name == "sigreg":
        expected = plain.lejepa(references, random_slices(5, 6, 5, views[0]).double(), 0.3)
    else:  # a mean over pairs of a global view and any other
        pairs = [(a, b) for a in references[:2] for b in references if b is not a]
        expected = torch.stack([FORMULAS[name](references, pair) for pair in pairs]).mean()
    terms = one(views, [], None)
    assert_same(terms.loss, expected, views, references, tolerance)


def test_two_parts_of_simclr_are_its_loss_and_neither_is_negative_alone():
    terms = objective("simclr", temperature=0.2)(views_of(2), [], None)
    assert sum(terms.parts.values()).item() == pytest.approx(terms.loss.item(), rel=1e-12)
    assert terms.parts["alignment"] >= 0


@DTYPES
def test_byol_is_the_authors_and_its_targets_get_no_gradient(dtype, tolerance):
    predictions, targets = views_of(2, dtype=dtype), views_of(2, dtype=dtype)
    references = [view.detach().double().requires_grad_() for view in predictions]
    expected = plain.byol(references, [one.double() for one in targets])
    found = prediction_error(predictions[0], targets[1]) + prediction_error(predictions[1], targets[0])
    assert_same(found, expected, predictions, references, tolerance)
    assert torch.autograd.grad(found, targets, allow_unused=True) == (None, None)


def test_byol_sums_either_order_and_its_teacher_follows():
    model = worker.build_model("byol", expander_norm="layer")
    inputs = {"pixel_values": worker.batch_of("byol")["pixel_values"]}
    outputs = model(**inputs)
    student = [model.objective.predictor(model.expander(one)) for one in outputs.representations.unbind(1)]
    teacher = model.objective.teacher
    with torch.no_grad():
        encoder = teacher["encoder"].eval()
        pooled = [encoder(pixel_values=one).pooler_output for one in inputs["pixel_values"].unbind(1)]
        targets = [teacher["expander"](one) for one in pooled]
    assert outputs.loss.item() == pytest.approx(plain.byol(student, targets).item(), rel=1e-10)
    # section 3.3: from the base to 1 along a cosine
    assert [teacher_momentum(0.9, step, 10) for step in (0, 5, 10)] == pytest.approx([0.9, 0.95, 1.0])
    before = [one.clone() for one in teacher.parameters()]
    model.begin_step(5, 10)
    momentum = teacher_momentum(0.996, 5, 10)
    model.end_step()
    weights = [one for part in (model.encoder, model.expander) for one in part.parameters()]
    for old, new, weight in zip(before, teacher.parameters(), weights, strict=True):
        torch.testing.assert_close(new, momentum * old + (1 - momentum) * weight, rtol=1e-12, atol=1e-14)
        assert not new.requires_grad
    # a run begins with a copy, whatever its encoder has been given since it was built
    model.begin_step(0, 10)
    assert all(torch.equal(one, other) for one, other in zip(teacher.parameters(), weights, strict=True))


def test_matches_are_those_of_a_plain_loop():
    places = [torch.randn(3, count, 2, dtype=torch.float64) for count in (11, 6)]
    for own, candidates in (places, places[::-1]):
        for count in (1, 4, 20):
            chosen, found = nearest(torch.cdist(own, candidates), count)
            for image in range(3):
                pairs = set(zip(chosen[image].tolist(), found[image].tolist(), strict=True))
                assert pairs == plain.matches(own[image], candidates[image], count)


@DTYPES
@pytest.mark.parametrize("small_views", [0, 1], ids=["two-views", "multi-crop"])
def test_local_terms_are_the_authors(small_views, dtype, tolerance, monkeypatch):
    monkeypatch.setattr("hf_vicreg.modeling.vicregl.MOST_DISTANCES", 200)  # some images at a time
    one = objective("vicregl", num_matches=[5, 2], local_expander_sizes=[4])
    sizes = [9, 9, 4][: 2 + small_views]
    maps = [torch.randn(6, size, 4, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]
    places = [torch.randn(6, size, 2, dtype=torch.float64).to(dtype) for size in sizes]
    references = [one.detach().double().requires_grad_() for one in maps]
    found = one._local_terms([Patches(*pair) for pair in zip(maps, places, strict=True)], None)
    expected = plain.local_invariance([(m, p.double()) for m, p in zip(references, places, strict=True)], (5, 2))
    assert_same(found[0], expected, maps, references, tolerance)
    own, other = maps[0], references[0]
    for term, reference in zip(map_statistics(own, 1.0, 1e-4), plain.map_terms(other, 1.0, 1e-4), strict=True):
        assert_same(term, reference, [own], [other], tolerance)
    of_views = [plain.map_terms(one, 1.0, 1e-4) for one in references]
    for term, terms in zip(found[1:], zip(*of_views, strict=True), strict=True):
        assert term.item() == pytest.approx(torch.stack(terms).mean().item(), rel=tolerance)


def test_vicregl_mixes_whole_images_and_patches():
    model, batch = worker.build_model("vicregl"), worker.batch_of("vicregl")
    outputs = model(**batch)
    parts = outputs.parts
    whole = 25 * parts["invariance"] + 25 * parts["variance"] + parts["covariance"]
    local = 25 * parts["local_invariance"] + 25 * parts["local_variance"] + parts["local_covariance"]
    assert outputs.loss.item() == pytest.approx((0.75 * whole + 0.25 * local).item(), rel=1e-10)
    with pytest.raises(ValueError, match=r"`geometry`: expected where the views were cut out"):
        model(pixel_values=batch["pixel_values"])


def test_centres_of_patches_lie_where_the_matrix_says():
    # a view of the right half of an image of 2 x 1, flipped: x runs from its right border to its middle
    centres = centres_in_image(torch.tensor([[-0.5, 0.0, 1.0, 0.0, 0.5, 0.0]]), 1, 2)
    torch.testing.assert_close(centres, torch.tensor([[[0.875, 0.25], [0.625, 0.25]]]))


def of_one(name, model):
    """One of a model's methods, alone, with the model's weights."""
    alone = worker.build_model(name)
    weights, prefix = model.state_dict(), f"objective.parts.{name}."
    own = {key: one for key, one in weights.items() if key.startswith(("encoder.", "expander."))}
    own |= {f"objective.{key.removeprefix(prefix)}": one for key, one in weights.items() if key.startswith(prefix)}
    alone.load_state_dict({key: one for key, one in own.items() if key in alone.state_dict()})
    return alone


def test_the_loss_of_several_is_their_weighted_sum():
    name = "vicregl+byol+sigreg"
    model, batch = worker.build_model(name), worker.batch_of(name)
    outputs = model(**batch)
    outputs.loss.backward()
    loss, expected = 0.0, {}
    for part, weight in {"vicregl": 0.1, "byol": 2, "sigreg": 3}.items():
        alone = of_one(part, model)
        found = alone(**batch)
        (weight * found.loss).backward()
        loss += weight * found.loss.item()
        assert outputs.parts[f"{part}_loss"].item() == pytest.approx(found.loss.item(), rel=1e-12)
        for key, value in found.parts.items():
            assert outputs.parts[f"{part}_{key}"].item() == pytest.approx(value.item(), rel=1e-10)
        for key, one in alone.named_parameters():
            if one.grad is not None:
                key = key.replace("objective.", f"objective.parts.{part}.")
                expected[key] = expected.get(key, 0) + one.grad
    assert outputs.loss.item() == pytest.approx(loss, rel=1e-10)
    own = {key: one.grad for key, one in model.named_parameters() if one.grad is not None}
    assert own.keys() == expected.keys()
    for key, gradient in own.items():
        assert (gradient - expected[key]).norm() <= 1e-10 * max(expected[key].norm(), 1), key


def test_what_is_beside_a_masked_method_sees_the_features_of_what_it_leaves_visible():
    model, batch = worker.build_model("mae+vicreg"), worker.batch_of("mae")
    model.begin_step(3, 10)
    outputs = model(**batch)
    outputs.loss.backward()
    alone = worker.build_model("mae")
    alone.load_state_dict(of_one("mae", model).state_dict())
    alone.begin_step(3, 10)
    *pooled, errors = alone.encode(**batch)  # once
    expander = worker.build_model("vicreg").expander
    expander.load_state_dict(model.expander.state_dict())
    embeddings = [expander(one) for one in pooled]
    terms = vicreg_loss(*embeddings[:2], local_views=embeddings[2:])
    loss = errors.mean() + 0.04 * terms.loss
    loss.backward()
    assert outputs.loss.item() == pytest.approx(loss.item(), rel=1e-10)
    assert set(outputs.parts) == {"mae_loss", "mae_reconstruction"} | {f"vicreg_{one}" for one in terms._fields}
    pairs = [(model.encoder, alone.encoder), (model.expander, expander)]
    pairs.append((masked_part(model.objective).decoder, alone.objective.decoder))
    for own, other in pairs:
        one, two = (torch.cat([each.grad.flatten() for each in part.parameters()]) for part in (own, other))
        assert (one - two).norm() <= 1e-10 * two.norm()


APART = {
    "unknown": ("mae+vicrag", {}, r"`objective`: expected one of .*, or several with \+ between, got 'mae\+vicrag'"),
    "twice": ("vicreg+vicreg", {}, r"`objective`: expected each method once, got 'vicreg' 2 times"),
    "masks": ("mae+simmim", {}, r"`objective`: expected one method that masks images at most, got mae and simmim"),
    "patches": (
        "vicregl+mae",
        {},
        r"`objective`: expected no method beside mae that needs every patch .* got vicregl",
    ),
    "weight": ("mae+vicreg", {"weights": {"mae": -1}}, r"`objective_weights.mae`: expected at least 0, got -1"),
    "nan": (
        "mae+vicreg",
        {"weights": {"mae": float("nan")}},
        r"`objective_weights.mae`: expected at least 0, got nan",
    ),
    "other": (
        "mae+vicreg",
        {"weights": {"byol": 1}},
        r"`objective_weights`: expected weights of mae, vicreg, got one",
    ),
    "nothing": ("mae+vicreg", {"weights": {"mae": 0, "vicreg": 0}}, r"`objective_weights`: expected one above 0"),
    "flat": (
        "mae+vicreg",
        {"mask_ratio": 0.5},
        r"`objective_settings`: expected `weights` and settings of mae, vicreg",
    ),
    "setting": ("mae+simclr", {"simclr": {"temperature": 0}}, r"`temperature`: expected a number above 0"),
}


@pytest.mark.parametrize("case", APART)
def test_methods_that_do_not_go_together_are_told_apart(case):
    name, settings, message = APART[case]
    with pytest.raises(StrictDataclassError, match=message):
        VicRegConfig(encoder=worker.ENCODER, objective=name, objective_settings=settings)


@pytest.mark.parametrize("name", worker.NAMES)
def test_pieces_have_the_gradient_of_the_whole_batch(name):
    whole, batch = worker.build_model(name), worker.batch_of(name)
    outputs = whole(**batch)
    outputs.loss.backward()
    expected, model = worker.gradients(whole), worker.build_model(name)
    pieces = [worker.share(batch, piece, 3) for piece in range(3)]
    found = two_pass_backward(model, [lambda one=one: one for one in pieces], torch.Tensor.backward)
    assert found.loss.item() == pytest.approx(outputs.loss.item(), rel=1e-12)
    assert (worker.gradients(model) - expected).norm() <= 1e-10 * expected.norm()


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 3], ids="{}-processes".format)
def results(request, made_once, ranks):
    """What the worker measured with that many processes, its world size asserted first."""
    count, script = request.param, Path(__file__).with_name("worker_objectives.py")

    def measure(output):
        finished = ranks(count, script, count, output, timeout_s=400)
        assert finished.returncode == 0, finished.stderr[-3000:]

    loaded = load_file(made_once(f"objectives_{count}", measure))
    assert loaded["world_size"] == request.param
    return loaded


@pytest.mark.distributed
@DTYPES
@pytest.mark.parametrize("name", worker.NAMES)
def test_several_processes_have_the_gradient_of_the_joined_batch(results, name, dtype, tolerance):
    if dtype not in worker.dtypes_of(name):
        pytest.skip("one precision is enough for a sum")
    model = worker.build_model(name, dtype)
    outputs = model(**worker.batch_of(name, dtype))
    outputs.loss.backward()
    expected = worker.gradients(model)
    for pieces in (1, 2) if dtype == torch.float64 else (2,):
        key = f"{name}_{str(dtype).removeprefix('torch.')}_{pieces}"
        assert results[f"{key}_loss"].item() == pytest.approx(outputs.loss.item(), rel=tolerance)
        assert (results[f"{key}_gradient"] - expected).norm() <= tolerance * expected.norm()
    # the wrong form fails this comparison, but where the loss is a mean over images
    if dtype == torch.float64 and name not in ("mae", "simmim"):
        assert (results[f"{name}_wrong"] - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize("name", ["byol", "vicregl", "vicreg", "simclr"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_weights_in_half_precision_give_a_loss_and_a_gradient(name, dtype):
    model, inputs = worker.build_model(name, torch.float32), worker.batch_of(name, torch.float32)
    expected = model(**inputs).loss.item()
    model.to(dtype)
    loss = model(**{key: one.to(dtype) if key != "geometry" else one for key, one in inputs.items()}).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=0.1)
    assert all(one.grad.isfinite().all() for one in model.parameters() if one.grad is not None)


def test_a_teacher_that_was_stored_does_not_learn(tmp_path):
    model = VicRegForPreTraining(VicRegConfig(encoder=worker.ENCODER, expander_sizes=[8, 5], objective="byol"))
    model.save_pretrained(tmp_path)
    again, _ = VicRegForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    learning = [{name for name, one in each.named_parameters() if one.requires_grad} for each in (model, again)]
    assert learning[0] == learning[1]
    assert not [name for name in learning[1] if "teacher" in name]


@pytest.mark.parametrize("name", ["mae", "simmim"])
def test_a_decoder_that_is_new_beside_loaded_weights_has_a_mask_token(tmp_path, name):
    VicRegForPreTraining(VicRegConfig(encoder=worker.ENCODER, expander_sizes=[8, 5])).save_pretrained(tmp_path)
    for _ in range(3):  # what lay in the memory may be zero once
        model = VicRegForPreTraining.from_pretrained(tmp_path, objective=name)
        token = next(one for key, one in model.named_parameters() if key.endswith("mask_token"))
        assert 0 < token.abs().max() < 1
