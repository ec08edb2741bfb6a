"""Few-shot classifiers: draws, the minimum of CLAP by its own gradient, and what each way finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from m2_encoder.errors import UserError
from m2_encoder.evaluation.measures.classification import measure_classification
from m2_encoder.evaluation.measures.few_shot import (
    ONE_SHOT_PENALTY,
    Prototypes,
    class_penalties,
    draw_shots,
    fit_clap,
    measure_few_shot,
    split_classes,
)
from m2_encoder.evaluation.measures.probes import Labelled, fit_logistic, measure_linear, measure_neighbours

CLASSES, WIDTH = 5, 16


@pytest.fixture
def parts() -> tuple[Labelled, Labelled, Prototypes]:
    """Pictures around centres of which the class vectors know something."""
    torch.manual_seed(3)
    centres = normalize(torch.randn(CLASSES, WIDTH), dim=1)
    sides = []
    for number in (120, 400):
        targets = torch.randint(0, CLASSES, (number,))
        sides.append(Labelled(centres[targets] + 0.35 * torch.randn(number, WIDTH), targets))
    return sides[0], sides[1], Prototypes(centres + 0.3 * torch.randn(CLASSES, WIDTH), 8.0)


def unit(part: Labelled) -> Labelled:
    return Labelled(normalize(part.features.double(), dim=1), part.targets)


def test_draws_are_of_each_class_and_grow() -> None:
    targets = torch.tensor([0] * 9 + [1] * 2 + [3] * 5)
    smaller = torch.tensor([], dtype=torch.long)
    for shots in (1, 2, 4, 8):
        rows = draw_shots(targets, shots, seed=1)
        assert torch.bincount(targets[rows], minlength=4).tolist() == [min(shots, n) for n in (9, 2, 0, 5)]
        assert set(smaller.tolist()) <= set(rows.tolist())
        assert rows.tolist() == sorted(set(rows.tolist()))
        smaller = rows
    draws = {tuple(draw_shots(targets, 2, seed=seed).tolist()) for seed in range(8)}
    assert len(draws) > 4


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_part_of_each_class_is_held_out(share: float) -> None:
    targets = torch.tensor([0, 1, 0, 1, 2] + [0] * 8)
    asked = split_classes(targets, share)
    held = torch.bincount(targets[asked], minlength=3).tolist()
    assert held == [{0.1: 1, 0.5: 5, 0.9: 9}[share], 1, 0]


def test_clap_is_at_the_minimum_that_numpy_finds(parts: tuple[Labelled, Labelled, Prototypes]) -> None:
    """Its gradient, written out without autograd, is zero; and the function is convex."""
    train, _, prototypes = parts
    x, y = unit(train).features.numpy(), train.targets.numpy()
    vectors = normalize(prototypes.vectors.double(), dim=1).numpy()

    def softmax(scores: np.ndarray) -> np.ndarray:
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))

    chances = softmax(8.0 * x @ vectors.T)
    penalties = np.array([chances[y == number, number].mean() for number in range(CLASSES)])
    found = fit_clap(unit(train), prototypes).numpy()
    error = softmax(8.0 * x @ found.T)
    error[np.arange(len(y)), y] -= 1
    gradient = 8.0 * error.T @ x / len(y) + 2 / CLASSES * penalties[:, None] * (found - vectors)
    assert np.abs(gradient).max() < 1e-5
    assert np.abs(found - vectors).max() > 0.05
    assert class_penalties(unit(train), Prototypes(torch.from_numpy(vectors), 8.0)).numpy() == pytest.approx(penalties)


def test_a_class_without_a_picture_stays_where_its_name_is() -> None:
    features = normalize(torch.randn(4, WIDTH).double(), dim=1)
    prototypes = Prototypes(torch.randn(3, WIDTH).double(), 1e-9)
    penalties = class_penalties(Labelled(features, torch.tensor([0, 0, 2, 2])), prototypes)
    assert penalties.tolist() == pytest.approx([1 / 3, 1, 1 / 3])


def test_all_pictures_give_what_the_single_measures_give(parts: tuple[Labelled, Labelled, Prototypes]) -> None:
    train, test, prototypes = parts
    *_, whole = measure_few_shot(train, test, [prototypes], num_classes=CLASSES, shots=[1], seeds=2)
    assert whole.shots is None
    knn = measure_neighbours(train, test, num_classes=CLASSES).measurements[0].value
    linear = measure_linear(train, test, num_classes=CLASSES).classification.measurements[0].value
    assert (whole.knn, whole.linear) == ((knn,), (linear,))
    weights = fit_clap(unit(train), prototypes)
    hits = (unit(test).features @ weights.t()).argmax(dim=1) == test.targets
    assert whole.clap == ((pytest.approx(100 * float(hits.double().mean())),),)


def test_draws_are_measured_one_by_one(parts: tuple[Labelled, Labelled, Prototypes]) -> None:
    train, test, prototypes = parts
    found = measure_few_shot(train, test, [prototypes, prototypes], num_classes=CLASSES, shots=[1, 4, 500], seeds=3)
    assert [each.shots for each in found] == [1, 4, None], "no class has 500 pictures"
    for seed in range(3):
        rows = draw_shots(train.targets, 1, seed=seed)
        drawn = unit(Labelled(train.features[rows], train.targets[rows]))
        weights = fit_logistic(drawn, CLASSES, ONE_SHOT_PENALTY)
        answers = (unit(test).features @ weights[:-1] + weights[-1]).argmax(dim=1)
        assert found[0].linear[seed] == pytest.approx(100 * float((answers == test.targets).double().mean()))
    assert found[0].clap[0] == found[0].clap[1]
    means = [torch.tensor(each.linear).mean() for each in found]
    assert means[0] < means[1] < means[2]
    zero_shot = measure_classification(test.features, prototypes.vectors, test.targets).measurements[0].value
    assert float(torch.tensor(found[0].clap[0]).mean()) > zero_shot - 3, "it is held near the names"
    assert min(found[0].clap[0]) > max(found[0].linear)


def test_a_class_that_nothing_was_learnt_of_is_refused(parts: tuple[Labelled, Labelled, Prototypes]) -> None:
    train, test, prototypes = parts
    rows: Tensor = train.targets != 2
    left = Labelled(train.features[rows], train.targets[rows])
    with pytest.raises(UserError, match="1 classes of the test part have no training picture, class 2 first"):
        measure_few_shot(left, test, [prototypes], num_classes=CLASSES, shots=[1], seeds=1)


def test_one_shot_of_linear_equals_scikit_learn(parts: tuple[Labelled, Labelled, Prototypes]) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed")
    train, test, _ = parts
    rows = draw_shots(train.targets, 1, seed=0)
    drawn = unit(Labelled(train.features[rows], train.targets[rows]))
    peer = linear_model.LogisticRegression(C=1 / (ONE_SHOT_PENALTY * len(rows)), max_iter=10_000, tol=1e-9)
    peer.fit(drawn.features.numpy(), drawn.targets.numpy())
    (first, _) = measure_few_shot(train, test, [], num_classes=CLASSES, shots=[1], seeds=1)
    score = 100 * peer.score(unit(test).features.numpy(), test.targets.numpy())
    assert first.linear[0] == pytest.approx(score, abs=0.3)
