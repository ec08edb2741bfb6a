"""Classifiers on frozen features from a few pictures of each class: what little data can give without training.

Letters: n training pictures · m test pictures · C classes · E feature dim · K pictures of a class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from m2_encoder.errors import UserError
from m2_encoder.evaluation.measures.probes import (
    Labelled,
    choose_penalty,
    fit_logistic,
    logits,
    minimize,
    prepare_sides,
    rank_by_votes,
    rank_scores,
)

ONE_SHOT_PENALTY: Final = 0.01
"""Of the linear probe where no class has two pictures, so that none can choose it."""


class Prototypes(NamedTuple):
    """What a model knows of the classes without a picture."""

    vectors: Tensor  # of their names, (C, E)
    scale: float  # of cosines, exp(logit_scale)


class FewShot(NamedTuple):
    """Top-1 of one number of pictures per class, percent: one value per draw."""

    shots: int | None  # K; None for all pictures
    knn: tuple[float, ...]
    linear: tuple[float, ...]
    clap: tuple[tuple[float, ...], ...]  # for each of the prototypes


def split_classes(targets: Tensor, test: float, *, seed: int = 0) -> Tensor:
    """Which pictures are the test part, (n,) bool: a share of each class; of two or more at least one on each side.

    A class with one picture is learnt and not asked for.
    """
    chosen = torch.zeros(len(targets), dtype=torch.bool)
    for rows in _in_order(targets, seed):
        number = min(max(1, round(test * len(rows))), len(rows) - 1)
        chosen[rows[:number]] = True
    return chosen


def draw_shots(targets: Tensor, shots: int, *, seed: int) -> Tensor:
    """Rows of K pictures of each class, or all there are, ascending; of one seed, a larger K holds a smaller one."""
    return torch.cat([rows[:shots] for rows in _in_order(targets, seed)]).sort().values


def _in_order(targets: Tensor, seed: int) -> list[Tensor]:
    """Rows of each class that has any, in a random order."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    order = order[targets[order].argsort(stable=True)]
    return list(order.split(torch.bincount(targets).clamp(min=0).tolist()))


def fit_clap(train: Labelled, prototypes: Prototypes) -> Tensor:
    """A linear probe that starts at the class vectors and is held near them, (C, E) fp64.

    It is the minimum of the mean loss of `scale * features @ weights.T` plus, as a mean over classes, `p *
    |weights - vectors|^2`, where p is the probability that the vectors give to the right class, on average over the
    class's training pictures: what is known well already moves little. No held-out pictures are needed.

    Reference: CLAP (arXiv:2312.12730), sections 4.2 and 4.3. There, weights are normalised in each step, and a fixed
    number of steps is done on augmented pictures; here the features are fixed, and the minimum is the only one.

    Args:
        train: unit features, fp64.
        prototypes: one for each class.
    """
    vectors = normalize(prototypes.vectors.to(train.features), dim=1)
    penalties = class_penalties(train, prototypes._replace(vectors=vectors))

    def loss(weights: Tensor) -> Tensor:
        scores = prototypes.scale * train.features @ weights.t()
        return cross_entropy(scores, train.targets) + (penalties * (weights - vectors).square().sum(dim=1)).mean()

    return minimize(loss, vectors)


def class_penalties(train: Labelled, prototypes: Prototypes) -> Tensor:
    """Mean probability of the right class over each class's pictures, (C,); 1 for a class without one."""
    chances = (prototypes.scale * train.features @ prototypes.vectors.t()).softmax(dim=1)
    right = chances.gather(1, train.targets[:, None])[:, 0]
    number = len(prototypes.vectors)
    totals = torch.zeros(number, dtype=right.dtype, device=right.device).index_add_(0, train.targets, right)
    counts = torch.bincount(train.targets, minlength=number)
    return torch.where(counts > 0, totals / counts.clamp(min=1), torch.ones_like(totals))


def measure_few_shot(
    train: Labelled,
    test: Labelled,
    prototypes: Sequence[Prototypes],
    *,
    num_classes: int,
    shots: Sequence[int],
    seeds: int,
) -> list[FewShot]:
    """Top-1 by nearest neighbours, by a linear probe, and by CLAP, for each K with several draws, then of all pictures.

    A K of which no class has as many is left out. A penalty of the linear probe is chosen on a fifth of what was drawn;
    from one picture per class it is 0.01.

    Raises:
        UserError: if a feature is not finite, targets do not fit, or a class that is asked for has no training picture.
    """
    train, test = prepare_sides(train, test, num_classes)
    counts = torch.bincount(train.targets, minlength=num_classes)
    if missing := sorted({*test.targets.tolist()} - {*counts.nonzero()[:, 0].tolist()}):
        raise UserError(f"{len(missing):,} classes of the test part have no training picture, class {missing[0]} first")
    found = []
    for number in [*(each for each in shots if each <= int(counts.max())), None]:
        draws = []
        for seed in range(seeds if number is not None else 1):
            rows = torch.arange(len(train.targets))
            rows = rows if number is None else draw_shots(train.targets.cpu(), number, seed=seed)
            rows = rows.to(train.targets.device)
            draws.append(_measure(Labelled(train.features[rows], train.targets[rows]), test, prototypes, num_classes))
        knn, linear, *clap = zip(*draws, strict=True)
        found.append(FewShot(number, knn, linear, tuple(clap)))
    return found


def _measure(train: Labelled, test: Labelled, prototypes: Sequence[Prototypes], num_classes: int) -> list[float]:
    """Top-1 of each way."""
    chosen = choose_penalty(train, num_classes)
    weights = fit_logistic(train, num_classes, ONE_SHOT_PENALTY if chosen is None else chosen[1])
    scores = [logits(test.features, weights), *(test.features @ fit_clap(train, each).t() for each in prototypes)]
    votes = rank_by_votes(train, test, num_classes)
    return [votes.recall(1), *(rank_scores(each, test.targets).recall(1) for each in scores)]
