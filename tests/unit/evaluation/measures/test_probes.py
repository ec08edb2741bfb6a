"""Neighbours against a loop in plain Python, the linear probe against scikit-learn and its own gradient."""

from __future__ import annotations

import collections
import math

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from m2_encoder.errors import UserError
from m2_encoder.evaluation.measures.classification import Classification
from m2_encoder.evaluation.measures.probes import (
    PENALTIES,
    Labelled,
    fit_logistic,
    measure_linear,
    measure_neighbours,
)

CLASSES = 6


def make_parts(*, noise: float = 0.35, pictures: int = 300) -> tuple[Labelled, Labelled]:
    """Features of both parts lie around the same centres; lengths differ, which must not matter."""
    centres = normalize(torch.randn(CLASSES, 20), dim=1)
    parts = []
    for _ in range(2):
        targets = torch.randint(0, CLASSES, (pictures,))
        features = centres[targets] + noise * torch.randn(pictures, 20)
        parts.append(Labelled(features * torch.rand(pictures, 1).add(0.5), targets))
    return parts[0], parts[1]


def accuracies(found: Classification) -> list[float]:
    return [each.value for each in found.measurements]


def test_neighbours_vote_by_their_cosine() -> None:
    train, test = make_parts()
    known, asked = normalize(train.features, dim=1).double(), normalize(test.features, dim=1).double()
    hits = 0
    for feature, target in zip(asked, test.targets.tolist(), strict=True):
        cosines = (known @ feature).tolist()
        votes: dict[int, float] = collections.defaultdict(float)
        for row in sorted(range(len(cosines)), key=lambda row: -cosines[row])[:20]:
            votes[int(train.targets[row])] += math.exp(cosines[row] / 0.07)
        hits += max(votes, key=votes.__getitem__) == target
    found = measure_neighbours(train, test, num_classes=CLASSES)
    assert accuracies(found)[0] == pytest.approx(100 * hits / len(asked))
    assert 40 < accuracies(found)[0] < 99
    assert [each.metric for each in found.measurements] == ["knn_top1", "knn_top5", "knn_mean_per_class"]


def test_linear_probe_is_at_the_minimum() -> None:
    train, _ = make_parts()
    features = normalize(train.features.double(), dim=1)
    for penalty in (1e-4, 1e-1):
        weights = fit_logistic(Labelled(features, train.targets), CLASSES, penalty).requires_grad_()
        logits = features @ weights[:-1] + weights[-1]
        loss = cross_entropy(logits, train.targets) + penalty / 2 * weights[:-1].square().sum()
        (gradient,) = torch.autograd.grad(loss, weights)
        assert float(gradient.abs().max()) < 1e-5


def test_linear_probe_equals_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    train, test = make_parts()
    known, asked = normalize(train.features.double(), dim=1), normalize(test.features.double(), dim=1)
    found = measure_linear(train, test, num_classes=CLASSES)
    assert found.penalty in PENALTIES
    peer = linear_model.LogisticRegression(C=1 / (found.penalty * len(known)), max_iter=1000, tol=1e-8)
    peer.fit(known.numpy(), train.targets.numpy())
    weights = fit_logistic(Labelled(known, train.targets), CLASSES, found.penalty)
    assert torch.allclose(weights[:-1].t(), torch.from_numpy(peer.coef_), atol=1e-3)
    assert accuracies(found.classification)[0] == pytest.approx(
        100 * peer.score(asked.numpy(), test.targets.numpy()), abs=0.34
    )


def test_linear_probe_chooses_by_the_held_out_part_and_repeats() -> None:
    train, test = make_parts(noise=0.6)
    found = measure_linear(train, test, num_classes=CLASSES)
    assert measure_linear(train, test, num_classes=CLASSES).classification.measurements == (
        found.classification.measurements
    )
    assert PENALTIES[0] < found.penalty < PENALTIES[-1]
    assert found.held_out == pytest.approx(accuracies(found.classification)[0], abs=15)


def test_perfect_collapsed_and_shuffled_features() -> None:
    targets = torch.arange(CLASSES).repeat(20)
    perfect, one = Labelled(torch.eye(CLASSES)[targets], targets), Labelled(torch.ones(len(targets), 3), targets)
    assert accuracies(measure_neighbours(perfect, perfect, num_classes=CLASSES)) == [100.0] * 3
    assert accuracies(measure_linear(perfect, perfect, num_classes=CLASSES).classification) == [100.0] * 3
    for found in (
        measure_neighbours(one, one, num_classes=CLASSES),
        measure_linear(one, one, num_classes=CLASSES).classification,
    ):
        assert all(each.value <= (each.chance or 0) + 1e-9 for each in found.measurements)
    train, test = make_parts(pictures=900)
    train = train._replace(targets=train.targets[torch.randperm(900)])
    for found in (
        measure_neighbours(train, test, num_classes=CLASSES),
        measure_linear(train, test, num_classes=CLASSES).classification,
    ):
        assert accuracies(found)[0] == pytest.approx(100 / CLASSES, abs=5)
        assert found.measurements[0].chance == pytest.approx(100 / CLASSES, abs=5)


def test_class_without_votes_is_never_right() -> None:
    train = Labelled(torch.eye(3), torch.tensor([0, 1, 2]))
    test = Labelled(torch.eye(3)[:2], torch.tensor([1, 3]))
    found = measure_neighbours(train, test, num_classes=7, neighbours=1)
    assert accuracies(found)[:2] == [0.0, 0.0]


def test_what_cannot_be_measured_is_named() -> None:
    train, test = make_parts(pictures=10)
    broken = test._replace(features=test.features.masked_fill(torch.arange(10)[:, None] < 3, math.nan))
    for measure in (measure_neighbours, measure_linear):
        with pytest.raises(UserError, match="3 of 10 test features are not finite"):
            measure(train, broken, num_classes=CLASSES)
        with pytest.raises(UserError, match="there are 2 classes"):
            measure(train, test, num_classes=2)
    single = Labelled(torch.eye(3), torch.tensor([0, 1, 2]))
    with pytest.raises(UserError, match="two training pictures"):
        measure_linear(single, single, num_classes=3)
