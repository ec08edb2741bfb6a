"""The geometry of the shared space: how near partners are, how evenly features spread, how far apart kinds lie.

All measures are of unit features; they are lengths and logarithms, not percent.

Letters: n, m items · P pairs · E feature dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from m2_encoder.errors import UserError
from m2_encoder.evaluation.measures.intervals import bootstrap_means, interval
from m2_encoder.evaluation.measures.result import Measurement, check_finite, check_pairs, check_same_width

_CHUNK_ROWS = 1024


def measure_alignment(first: Tensor, second: Tensor, pairs: Tensor, *, seed: int = 0) -> Measurement:
    """Alignment: the mean over pairs of |x - y|^2, 0 (best) to 4.

    Reference: Wang and Isola (arXiv:2005.10242), section 4.1, L_align with alpha = 2.

    Args:
        first: (n, E), any floating dtype.
        second: (m, E).
        pairs: rows of both sides that belong together, (P, 2) int64.
        seed: of the interval; pairs with the same second row are drawn together.

    Raises:
        UserError: if a feature is not finite, or pairs do not fit.
    """
    sides = {"first": first, "second": second}
    check_same_width(sides)
    check_finite(sides)
    pairs = check_pairs(pairs, ("first", len(first)), ("second", len(second)))
    distances = []
    for part in pairs.to(first.device).split(_CHUNK_ROWS):
        one, other = normalize(first[part[:, 0]].double(), dim=1), normalize(second[part[:, 1]].double(), dim=1)
        distances.append((one - other).square().sum(dim=1))
    squared = torch.cat(distances).cpu()
    low, high = interval(bootstrap_means(squared[:, None], pairs[:, 1], seed=seed)[:, 0])
    return Measurement("alignment", float(squared.mean()), len(pairs), low, high)


def measure_uniformity(features: Tensor) -> Measurement:
    """Uniformity: the logarithm of the mean over all pairs of two items of exp(-2 |x - y|^2), 0 (worst) to almost -4.

    Reference: Wang and Isola (arXiv:2005.10242), section 4.1, L_uniform with t = 2.

    Args:
        features: (n, E), any floating dtype; n at least 2.

    Raises:
        UserError: if a feature is not finite, or there is only one.
    """
    check_same_width({"item": features})
    check_finite({"item": features})
    number = len(features)
    if number < 2:
        raise UserError("uniformity needs two items; there is one")
    total = 0.0
    parts = features.split(_CHUNK_ROWS)
    for index, part in enumerate(parts):
        one = normalize(part.double(), dim=1)
        for other in parts[index:]:
            # |x - y|^2 = 2 - 2 x.y of unit vectors.
            kernel = (4.0 * (one @ normalize(other.double(), dim=1).t()).clamp(-1, 1) - 4.0).exp()
            total += float(kernel.triu(diagonal=1).sum() if other is part else kernel.sum())
    return Measurement("uniformity", math.log(total / (number * (number - 1) / 2)), number)


def measure_gap(first: Tensor, second: Tensor, *, metric: str = "modality_gap") -> Measurement:
    """Distance between the centres of two kinds of features, 0 to 2: images and texts, or texts of two languages.

    Reference: Liang et al. (arXiv:2203.02053), the length of Delta_gap.

    Args:
        first: (n, E), any floating dtype.
        second: (m, E).
        metric: its name, such as "zh_en_gap" between texts of two languages.

    Raises:
        UserError: if a feature is not finite, or sides do not fit.
    """
    sides = {"first": first, "second": second}
    check_same_width(sides)
    check_finite(sides)
    return Measurement(metric, float((_centre(first) - _centre(second)).norm()), len(first) + len(second))


def _centre(features: Tensor) -> Tensor:
    """Mean of unit features, (E,) fp64."""
    total = features.new_zeros(features.shape[1], dtype=torch.float64)
    for part in features.split(_CHUNK_ROWS):
        total += normalize(part.double(), dim=1).sum(dim=0)
    return total / len(features)
