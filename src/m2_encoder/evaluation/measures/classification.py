"""Zero-shot classification: each picture goes to the class whose vector is nearest.

From torchmetrics: `MultilabelAveragePrecision`, exact and over all classes; it groups equal scores, so that a model
that gives all pictures the same feature scores the share of right ones. Not from torchmetrics: `MulticlassAccuracy`
breaks ties by the order of classes, so that a collapsed model scores in the first one, and its macro average counts
classes that no picture belongs to.

Letters: n pictures · C classes · T prompts of each · E feature dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from m2_encoder.errors import UserError
from m2_encoder.evaluation.measures.intervals import (
    bootstrap_class_means,
    bootstrap_means,
    bootstrap_precision,
    interval,
)
from m2_encoder.evaluation.measures.ranks import Ranks, rank_queries
from m2_encoder.evaluation.measures.result import Measurement, check_finite, check_same_width

TOP_KS: Final = (1, 5)
_TIE_DECIMALS: Final = 12


class Classification(NamedTuple):
    """Accuracies."""

    measurements: tuple[Measurement, ...]  # top1, top5 (with more than five classes), mean_per_class
    ranks: Ranks  # of the right class of each picture, for galleries of what goes wrong
    per_class: Tensor  # top-1 of each class in percent, (C,) fp64; NaN where no picture belongs to it


def class_vectors(prompt_features: Tensor) -> Tensor:
    """Class vectors: the mean of unit prompt vectors, made unit again. (C, T, E) to (C, E) fp32.

    Reference: CLIP (arXiv:2103.00020), section 3.1.4.

    Raises:
        UserError: for another shape, features that are not finite, or prompts of a class that cancel.
    """
    if prompt_features.dim() != 3 or not prompt_features.numel():
        raise UserError(f"prompt features are {tuple(prompt_features.shape)}; they must be (C, T, E), none of them 0")
    check_finite({"prompt": prompt_features.flatten(0, 1)})
    means = normalize(prompt_features.double(), dim=2).mean(dim=1)
    nothing = means.norm(dim=1) < 1e-6
    if nothing.any():
        raise UserError(f"the prompt vectors of class {int(nothing.nonzero()[0])} cancel: their mean is zero")
    return normalize(means, dim=1).float()


def measure_classification(
    image_features: Tensor, vectors: Tensor, targets: Tensor, *, seed: int = 0, name: str = ""
) -> Classification:
    """Top-1 and top-5 (micro), and the mean over classes of their top-1 (classes without pictures left out).

    A class that scores the same as the right one ranks before it: of two classes with one name, none is ever right.

    Args:
        image_features: (n, E), any floating dtype.
        vectors: (C, E), as `class_vectors` makes them.
        targets: the right class of each picture, (n,) int64.
        seed: of the intervals; for the mean over classes, pictures are drawn within their class.
        name: before the names of metrics, such as "knn_".

    Raises:
        UserError: if a feature is not finite, or targets do not fit.
    """
    sides = {"image": image_features, "class": vectors}
    check_same_width(sides)
    check_finite(sides)
    check_targets(targets, len(image_features), len(vectors))
    pairs = torch.stack([torch.arange(len(targets)), targets.cpu()], dim=1)
    ranks = rank_queries(image_features, vectors, pairs)
    return summarize_accuracy(ranks, targets, seed=seed, name=name, chances=_guesses(len(vectors)))


def summarize_accuracy(
    ranks: Ranks, targets: Tensor, *, chances: Sequence[float], seed: int = 0, name: str = ""
) -> Classification:
    """Accuracies from the rank of the right class; `chances` are those of top-1, top-5 and the mean over classes."""
    targets, classes = targets.cpu(), ranks.num_gallery
    ks = [k for k in TOP_KS if k == 1 or k < classes]
    hits = torch.stack([ranks.hits(k) for k in ks], dim=1)
    means = 100.0 * bootstrap_means(hits, seed=seed)
    found = []
    for number, k in enumerate(ks):
        low, high = interval(means[:, number], len(hits))
        chance = chances[TOP_KS.index(k)]
        found.append(Measurement(f"{name}top{k}", ranks.recall(k), len(hits), low, high, chance, ranks.tie_share))
    totals = torch.bincount(targets, minlength=classes)
    right = torch.bincount(targets[hits[:, 0]], minlength=classes)
    present = totals > 0
    per_class = 100.0 * right.double() / totals
    resampled = 100.0 * bootstrap_class_means(right[present], totals[present], seed=seed)
    low, high = interval(resampled, len(hits))
    mean = float(per_class[present].mean())
    found.append(Measurement(f"{name}mean_per_class", mean, len(hits), low, high, chances[-1], ranks.tie_share))
    return Classification(tuple(found), ranks, per_class)


def measure_multilabel(image_features: Tensor, vectors: Tensor, targets: Tensor, *, seed: int = 0) -> Measurement:
    """Mean average precision over classes that have pictures, "map", in percent, by cosine.

    Args:
        image_features: (n, E), any floating dtype.
        vectors: (C, E).
        targets: (n, C) bool, at least one of them true.
        seed: of the interval, for which pictures are drawn.

    Raises:
        UserError: if a feature is not finite, or targets do not fit.
    """
    from torchmetrics.classification import MultilabelAveragePrecision

    sides = {"image": image_features, "class": vectors}
    check_same_width(sides)
    check_finite(sides)
    if targets.dtype != torch.bool or targets.shape != (len(image_features), len(vectors)) or not targets.any():
        raise UserError(
            f"targets are {tuple(targets.shape)} {targets.dtype}; they must be ({len(image_features)}, {len(vectors)}) "
            "bool, some of them true"
        )
    targets = targets.to(image_features.device)
    present = targets.any(dim=0)
    vectors, targets = vectors[present], targets[:, present]
    cosines = normalize(image_features.double(), dim=1) @ normalize(vectors.double(), dim=1).t()
    # In 0..1, where torchmetrics takes scores as they are; rounded, so that what is equal but for rounding ties.
    scores = ((1 + cosines) / 2).round(decimals=_TIE_DECIMALS).clamp(0, 1)
    low, high = interval(bootstrap_precision(scores.cpu(), targets.cpu(), seed=seed))
    one = len(vectors) == 1  # torchmetrics wants two labels at least
    scores, targets = (scores.repeat(1, 2), targets.repeat(1, 2)) if one else (scores, targets)
    metric = MultilabelAveragePrecision(num_labels=scores.shape[1], average="macro", thresholds=None)
    value = 100.0 * float(metric.to(scores.device)(scores, targets.long()))
    chance = sum(chance_precision(len(targets), int(number)) for number in targets.sum(dim=0)) / targets.shape[1]
    return Measurement("map", value, len(targets), 100.0 * low, 100.0 * high, chance)


def chance_precision(total: int, right: int) -> float:
    """Expected average precision of a random order, in percent.

    Of the k first, a right one at k has (k - 1) (R - 1) / (n - 1) others that are right among those before it, on
    average; this summed over all places, each of which holds a right one with probability R / n, and divided by R.
    """
    harmonic = float((1.0 / torch.arange(1, total + 1, dtype=torch.float64)).sum())
    others = (right - 1) / (total - 1) if total > 1 else 0.0
    return 100.0 * (harmonic + others * (total - harmonic)) / total


def check_targets(targets: Tensor, number: int, classes: int) -> None:
    """Refuses targets that are not (n,) whole numbers of a class."""
    if targets.shape != (number,) or targets.is_floating_point() or targets.dtype == torch.bool:
        raise UserError(f"targets are {tuple(targets.shape)} {targets.dtype}; they must be ({number},) whole numbers")
    wrong = (targets < 0) | (targets >= classes)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise UserError(f"picture {row} has class {int(targets[row])}; there are {classes} classes, from 0")


def _guesses(classes: int) -> tuple[float, float, float]:
    """Accuracies of guessing: top-1, top-5, mean over classes."""
    return 100.0 / classes, 100.0 * min(1.0, TOP_KS[1] / classes), 100.0 / classes
