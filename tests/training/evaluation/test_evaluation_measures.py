"""k-NN for several k, linear probe, retrieval, confusion and results against other hands' code or by hand."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.neighbors import KNeighborsClassifier

from hf_vicreg.model_cards.schema import FIGURES
from hf_vicreg.training.errors import InputError
from hf_vicreg.training.evaluation.arguments import FewLabelsArguments, TuningArguments
from hf_vicreg.training.evaluation.linear import STRENGTHS, linear_probe
from hf_vicreg.training.evaluation.neighbours import knn_predictions, mean_average_precision
from hf_vicreg.training.evaluation.pictures import confusion_matrix
from hf_vicreg.training.evaluation.results import add_evaluation, read_results
from hf_vicreg.training.tasks.classification.few_labels import amount_name, mean_and_spread, parse_amount, tuning_of


def clusters(count, *, classes=4, width=6, spread=1.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % classes
    return centres[labels] + spread * torch.randn(count, width, generator=generator), labels


def test_one_search_gives_every_k():
    bank, bank_labels = clusters(300)
    queries, _ = clusters(101, seed=1)
    found = knn_predictions(bank, bank_labels, queries, neighbours=[1, 5, 20, 200], temperature=0.1)
    for k, predictions in found.items():
        reference = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.1)
        ).fit(bank.double(), bank_labels)
        assert (torch.from_numpy(reference.predict(queries.double())) == predictions).float().mean() > 0.985, k


def test_linear_probe_is_the_minimum_of_the_regularised_loss():
    features, labels = clusters(240)
    test_features, test_labels = clusters(200, seed=1)
    probe = linear_probe(features, labels, test_features, held_out_ratio=0.2, seed=0)
    assert probe.converged
    assert set(probe.held_out) == set(STRENGTHS)
    assert probe.held_out[probe.strength] == max(probe.held_out.values())
    # the same loss by another optimiser: sum of cross-entropies + |W|^2 / (2 C), bias free, standardised features
    mean, deviation = features.double().mean(0), features.double().std(0, correction=0)
    x, x_test = (features.double() - mean) / deviation, (test_features.double() - mean) / deviation
    weight = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight + bias, labels, reduction="sum")
        value = value + weight.square().sum() / (2 * probe.strength)
        value.backward()
        return value

    optimizer.step(loss)
    expected = (x_test @ weight + bias).argmax(1)
    assert (expected == probe.predictions).float().mean() >= 0.995
    assert 0.4 < (probe.predictions == test_labels).float().mean() < 1


def test_the_test_split_has_no_part_in_the_choice():
    features, labels = clusters(240)
    chosen = {
        linear_probe(features, labels, test, held_out_ratio=0.2, seed=0).strength
        for test in (clusters(40, seed=1)[0], 100 * torch.randn(7, 6))
    }
    assert len(chosen) == 1


def test_one_label_a_class_is_enough():
    features, labels = clusters(4, spread=0.1)
    probe = linear_probe(features, labels, features, held_out_ratio=0.2, seed=0)
    assert (probe.strength, probe.held_out) == (1.0, {})
    assert torch.equal(probe.predictions, labels)
    with pytest.raises(InputError, match="at least 2 classes"):
        linear_probe(features[:1], labels[:1], features, held_out_ratio=0.2, seed=0)


def test_one_class_left_to_fit_is_no_choice():
    features, _ = clusters(100)
    labels = (torch.arange(100) >= 98).long()
    probe = linear_probe(features, labels, features, held_out_ratio=0.9, seed=0)
    assert (probe.strength, probe.held_out) == (1.0, {})


def test_retrieval_equals_scikit_learn_per_query():
    gallery, gallery_labels = clusters(150)
    queries, query_labels = clusters(70, classes=4, seed=1)
    query_labels[0] = 9  # nothing in the gallery is of this class
    found, counted = mean_average_precision(gallery, gallery_labels, queries, query_labels)
    similarity = F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T
    expected = [
        average_precision_score((gallery_labels == label).numpy(), row.numpy())
        for row, label in zip(similarity[1:], query_labels[1:], strict=True)
    ]
    assert counted == 69
    assert found == pytest.approx(np.mean(expected), abs=1e-6)


def test_confusions_are_counted_by_true_class():
    labels, predictions = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 0, 2, 2])
    expected = sklearn_confusion(labels, predictions, labels=range(4))
    assert confusion_matrix(labels, predictions, 4).tolist() == expected.tolist()


@pytest.mark.parametrize(("text", "amount"), [("1%", 0.01), ("100%", 1.0), ("10", 10), ("0.5%", 0.005)])
def test_amounts_are_shares_or_numbers(text, amount):
    assert parse_amount(text) == amount
    assert type(parse_amount(text)) is type(amount)


@pytest.mark.parametrize(
    ("text", "name"),
    [("1%", "1%"), ("0.7%", "0.7%"), ("1 %", "1%"), ("+10", "10"), (" 1_0", "10"), ("1e-3%", "0.001%")],
)
def test_amounts_have_names_that_results_may_hold(text, name):
    assert amount_name(parse_amount(text)) == name
    assert FIGURES({f"linear_{name}_mean": 0.5}, "metrics")
    assert parse_amount(name) == pytest.approx(parse_amount(text))


@pytest.mark.parametrize("text", ["0", "-3", "0%", "101%", "ten", "%", "1.5"])
def test_other_amounts_are_refused(text):
    with pytest.raises(InputError, match="`labels`: expected percentages"):
        parse_amount(text)


@pytest.mark.parametrize("flags", [{"freeze_encoder": True}, {"lora_rank": 4}])
def test_an_untrained_encoder_learns_whole(flags):
    arguments = FewLabelsArguments(layer_decay=0.5, **flags)
    scratch, tuned = (tuning_of(method, arguments) for method in ("scratch", "finetuned"))
    assert (scratch.freeze_encoder, scratch.lora_rank, scratch.layer_decay) == (False, 0, 1)
    assert tuned == TuningArguments(layer_decay=0.5, max_steps=arguments.max_steps, **flags)


def test_mean_and_sample_deviation():
    assert mean_and_spread([0.1, 0.2, 0.6]) == (pytest.approx(0.3), pytest.approx(0.264575, abs=1e-6))
    assert mean_and_spread([0.4]) == (0.4, 0.0)


def record(task="knn", settings=None, accuracy=0.5):
    return {"task": task, "model": {}, "data": {}, "settings": settings or {}, "metrics": {"accuracy": accuracy}}


def test_results_are_added_and_nothing_is_lost(tmp_path):
    own = {"steps": 3, "knn_accuracy": {"trained": 0.4}}
    (tmp_path / "results.json").write_text(json.dumps(own))
    for one in (record(), record("linear"), record(settings={"seed": 1}), record(accuracy=0.7)):
        add_evaluation(tmp_path, one)
    results = read_results(tmp_path)
    assert {key: results[key] for key in own} == own
    found = [(one["task"], one["settings"], one["metrics"]["accuracy"]) for one in results["evaluations"]]
    assert found == [("linear", {}, 0.5), ("knn", {"seed": 1}, 0.5), ("knn", {}, 0.7)]
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(InputError, match="expected the results of a run"):
        add_evaluation(tmp_path, record())
    assert (tmp_path / "results.json").read_text() == "[1]"
