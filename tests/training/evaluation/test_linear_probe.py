"""The online linear probe against scikit-learn, and that watching a run does not change it."""

import json

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from hf_vicreg import pretrain
from hf_vicreg.training.evaluation.online_probe import linear_accuracy


@pytest.mark.parametrize("noise", [1.0, 2.5])
def test_equals_scikit_learn(noise):
    labels = torch.randint(0, 4, (600,))
    features = torch.randn(4, 8)[labels] + noise * torch.randn(600, 8)
    features = features * torch.logspace(-2, 2, 8) + 5  # of very different scales
    bank, queries, bank_labels, query_labels = features[:400], features[400:], labels[:400], labels[400:]
    found = linear_accuracy(bank, bank_labels, queries, query_labels)
    scaler = StandardScaler().fit(bank)
    reference = LogisticRegression(C=1.0, max_iter=1000, tol=1e-8).fit(scaler.transform(bank), bank_labels)
    assert found == pytest.approx(reference.score(scaler.transform(queries), query_labels), abs=1 / 200)
    assert 0.3 < found < 1


def test_draws_no_random_number_and_takes_constant_features():
    state = torch.get_rng_state()
    bank, labels = torch.eye(3), torch.tensor([0, 1, 2])
    bank = torch.cat([bank, torch.ones(3, 2)], dim=1)
    assert linear_accuracy(bank, labels, bank, labels) == 1.0
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_that_is_watched_closely_has_the_same_weights(tmp_path, tiny_recipe):
    common = tiny_recipe | {"num_train_epochs": 3, "knn_train_samples": 64, "knn_test_samples": 32}
    close = common | {"logging_steps": 1, "knn_every_epochs": 1, "linear_probe": True}
    loose = common | {"logging_steps": 100, "knn_every_epochs": 0}
    results = [
        pretrain(out=tmp_path / name, data="digits", max_train_samples=96, **settings)
        for name, settings in (("close", close), ("loose", loose))
    ]
    for one, other in zip(*(result.encoder.state_dict().values() for result in results), strict=True):
        assert torch.equal(one, other)
    assert set(results[0].results["linear_accuracy"]) == {"raw_pixels", "untrained", "trained"}
    assert results[1].results["linear_accuracy"] == {}
    lines = [json.loads(line) for line in (tmp_path / "close" / "log.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "linear_accuracy" in line]
    assert [line["epoch"] for line in measured] == [1, 2]
    assert all(0 <= line["linear_accuracy"] <= 1 for line in measured)
