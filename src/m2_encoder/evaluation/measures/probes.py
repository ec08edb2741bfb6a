"""Classification by frozen features of a training part: k nearest neighbours, and a linear probe.

Both work on unit features; metrics are called `knn_top1`, `linear_top1` and so on. Chance is what answering with the
most frequent class of the training part scores.

Letters: n training pictures · m test pictures · C classes · E feature dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from m2_encoder.errors import UserError
from m2_encoder.evaluation.measures.classification import Classification, check_targets, summarize_accuracy
from m2_encoder.evaluation.measures.nearest import find_nearest
from m2_encoder.evaluation.measures.ranks import Ranks
from m2_encoder.evaluation.measures.result import check_finite, check_same_width

NEIGHBOURS: Final = 20
TEMPERATURE: Final = 0.07
PENALTIES: Final = tuple(10.0**exponent for exponent in range(-7, 1))
"""Weights of the squared norm that a linear probe tries, beside the mean of the losses."""

_TIE_TOLERANCE: Final = 1e-9  # of votes and logits, whose scale is 1 and more
_HELD_OUT: Final = 5  # one of so many training pictures of each class chooses the penalty
_MAX_ITERATIONS: Final = 1000


class Labelled(NamedTuple):
    """Features and what they show."""

    features: Tensor  # (n, E), any floating dtype
    targets: Tensor  # class, (n,) int64


class LinearProbe(NamedTuple):
    """A linear probe's accuracies, and the penalty that it chose."""

    classification: Classification
    penalty: float
    held_out: float  # top-1 of the part that chose it, percent


def measure_neighbours(
    train: Labelled, test: Labelled, *, num_classes: int, neighbours: int = NEIGHBOURS, seed: int = 0
) -> Classification:
    """Weighted k nearest neighbours: each votes for its class with exp(cosine / 0.07).

    A class with as many votes as the right one ranks before it; so does every class if the right one has no vote.

    Reference: Wu et al. (arXiv:1805.01978), section 3.4, for the vote and its temperature; DINO (arXiv:2104.14294),
    evaluation protocols, for 20 neighbours.

    Args:
        train: neighbours come from here.
        test: what is classified.
        num_classes: C.
        neighbours: k; capped at n.
        seed: of the intervals.

    Raises:
        UserError: if a feature is not finite, or targets do not fit.
    """
    train, test = prepare_sides(train, test, num_classes)
    ranks = rank_by_votes(train, test, num_classes, neighbours)
    return summarize_accuracy(ranks, test.targets, seed=seed, name="knn_", chances=_majority(train, test, num_classes))


def rank_by_votes(train: Labelled, test: Labelled, num_classes: int, neighbours: int = NEIGHBOURS) -> Ranks:
    """Rank of the right class by votes of the nearest unit features, as `measure_neighbours` counts them."""
    found = find_nearest(test.features, train.features, neighbours)
    votes = torch.zeros(len(test.features), num_classes, dtype=torch.float64, device=found.scores.device)
    # Less the highest cosine: nothing overflows, and votes of a query keep their proportions.
    weights = ((found.scores - found.scores[:, :1]) / TEMPERATURE).exp()
    votes.scatter_add_(1, train.targets[found.rows], weights)
    own = votes.gather(1, test.targets[:, None])
    ranks = rank_scores(votes, test.targets)
    return ranks._replace(ranks=torch.where(own[:, 0].cpu() > 0, ranks.ranks, num_classes + 1))


def measure_linear(train: Labelled, test: Labelled, *, num_classes: int, seed: int = 0) -> LinearProbe:
    """Multinomial logistic regression with a squared penalty, by L-BFGS in fp64.

    The penalty is the one with the best top-1 on a fifth of the training part, the larger of equal ones; the regression
    is then fitted again to all of it. A class with the logit of the right one ranks before it.

    It is scikit-learn's `LogisticRegression(C=1 / (penalty * n))`, without needing scikit-learn.

    Reference: CLIP (arXiv:2103.00020), appendix A.3.

    Args:
        train: what it is fitted to; at least two pictures of one class.
        test: what is classified.
        num_classes: C.
        seed: of the part that is held out, and of the intervals.

    Raises:
        UserError: if a feature is not finite, or targets do not fit.
    """
    train, test = prepare_sides(train, test, num_classes)
    found = choose_penalty(train, num_classes, seed=seed)
    if found is None:
        raise UserError("no class has two training pictures: one of them must choose the penalty of the linear probe")
    score, penalty = found
    weights = fit_logistic(train, num_classes, penalty)
    ranks = rank_scores(logits(test.features, weights), test.targets)
    chances = _majority(train, test, num_classes)
    classification = summarize_accuracy(ranks, test.targets, seed=seed, name="linear_", chances=chances)
    return LinearProbe(classification, penalty, score)


def choose_penalty(train: Labelled, num_classes: int, *, seed: int = 0) -> tuple[float, float] | None:
    """Best top-1 on a held-out fifth of unit training features, percent, and the (largest) penalty that reached it.

    None where no class has two pictures.
    """
    held_out = _hold_out(train.targets, seed)
    if not held_out.any():
        return None
    kept, chosen = (Labelled(train.features[rows], train.targets[rows]) for rows in (~held_out, held_out))
    best = (-1.0, 0.0)
    start: Tensor | None = None
    for penalty in sorted(PENALTIES, reverse=True):
        start = fit_logistic(kept, num_classes, penalty, start=start)
        score = rank_scores(logits(chosen.features, start), chosen.targets).recall(1)
        best = max(best, (score, penalty))
    return best


def fit_logistic(train: Labelled, num_classes: int, penalty: float, *, start: Tensor | None = None) -> Tensor:
    """Weights and, in the last row, biases, (E + 1, C) fp64: the minimum of mean loss + penalty / 2 * |weights|^2."""
    features, targets = train.features, train.targets
    shape = (features.shape[1] + 1, num_classes)
    initial = torch.zeros(shape, dtype=torch.float64, device=features.device) if start is None else start

    def loss(weights: Tensor) -> Tensor:
        return cross_entropy(logits(features, weights), targets) + penalty / 2 * weights[:-1].square().sum()

    return minimize(loss, initial)


def minimize(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Where a smooth convex function is least, by L-BFGS from `start`, fp64."""
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=_MAX_ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=1e-12,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss(weights)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(step)
    return weights.detach()


def prepare_sides(train: Labelled, test: Labelled, num_classes: int) -> tuple[Labelled, Labelled]:
    """Unit features in fp64, checked.

    Raises:
        UserError: if a feature is not finite, or targets do not fit.
    """
    sides = {"train": train.features, "test": test.features}
    check_same_width(sides)
    check_finite(sides)
    for part in (train, test):
        check_targets(part.targets, len(part.features), num_classes)
    device = train.features.device
    return (
        Labelled(normalize(train.features.double(), dim=1), train.targets.to(device)),
        Labelled(normalize(test.features.to(device).double(), dim=1), test.targets.to(device)),
    )


def logits(features: Tensor, weights: Tensor) -> Tensor:
    """Scores of classes by what `fit_logistic` gives, (m, C)."""
    return features @ weights[:-1] + weights[-1]


def rank_scores(scores: Tensor, targets: Tensor) -> Ranks:
    """Rank of the right class by scores, (n, C); ties against it."""
    distance = scores - scores.gather(1, targets[:, None])
    distance.scatter_(1, targets[:, None], -torch.inf)
    tolerance = _TIE_TOLERANCE * scores.abs().amax(dim=1, keepdim=True)
    ahead, ties = distance >= -tolerance, distance.abs() <= tolerance
    return Ranks(ahead.sum(dim=1).cpu() + 1, ties.sum(dim=1).cpu(), scores.shape[1])


def _hold_out(targets: Tensor, seed: int) -> Tensor:
    """Every fifth picture of each class in a random order, one at least of two or more, (n,) bool."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed)).to(targets.device)
    order = order[targets[order].argsort(stable=True)]
    counts = torch.bincount(targets)
    starts = counts.cumsum(0) - counts
    places = torch.arange(len(targets), device=targets.device) - starts[targets[order]]
    held_out = torch.zeros_like(targets, dtype=torch.bool)
    held_out[order] = places % _HELD_OUT == 1
    return held_out


def _majority(train: Labelled, test: Labelled, num_classes: int) -> tuple[float, float, float]:
    counts = torch.bincount(train.targets, minlength=num_classes)
    shares = torch.bincount(test.targets, minlength=num_classes)[counts.argsort(descending=True, stable=True)]
    shares = 100.0 * shares.double() / len(test.targets)
    present = int((shares > 0).sum())
    return float(shares[0]), float(shares[:5].sum()), 100.0 / present
