"""95 % intervals by the percentile bootstrap: what the number would be for other queries of the same kind.

It says how far the choice of queries moves a number; not how far another seed of training or other prompts would. Where
no query or every one succeeds, resamples are all alike, and the exact binomial bound stands in their place. With few
queries it is somewhat too narrow.

Letters: Q queries · K numbers of each · R resamples · n pictures · C classes.

Reference: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3 (percentile); Davison and
Hinkley, Bootstrap Methods and their Application (1997), section 3.8 (groups drawn whole); Clopper and Pearson,
Biometrika 26 (1934), for none and all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

RESAMPLES: Final = 1000
LEVEL: Final = 0.95
_DRAWS_AT_ONCE: Final = 2**19


def bootstrap_means(
    values: Tensor, groups: Tensor | None = None, *, resamples: int = RESAMPLES, seed: int = 0
) -> Tensor:
    """Means of resampled queries.

    Args:
        values: (Q, K), any dtype; on the CPU.
        groups: of each query, (Q,) int64; queries of a group are drawn together, because they succeed and fail
            together, such as five captions of one picture. None if every query stands alone.
        resamples: R.
        seed: equal seeds draw the same rows, so that means of several K belong together.

    Returns:
        (R, K) fp64.
    """
    values = values.double()
    sizes = torch.ones(len(values), 1, dtype=torch.float64)
    if groups is not None:
        _, numbers = groups.unique(return_inverse=True)
        empty = torch.zeros(int(numbers.max()) + 1, 1, dtype=torch.float64)
        sizes = empty.index_add(0, numbers, sizes)
        values = empty.repeat(1, values.shape[1]).index_add(0, numbers, values)
    both = torch.cat([values, sizes], dim=1)
    sums = torch.cat([times @ both for times in _draw(len(both), resamples, seed)])
    return sums[:, :-1] / sums[:, -1:]


def bootstrap_class_means(hits: Tensor, totals: Tensor, *, resamples: int = RESAMPLES, seed: int = 0) -> Tensor:
    """Means over classes of resampled shares of hits, (R,) fp64; `hits` and `totals`, queries, are (C,) int64.

    Queries are drawn within their class. The hits of a resample are binomial, so no query is drawn one by one.
    """
    generator = torch.Generator().manual_seed(seed)
    totals = totals.double()
    shares = hits.double() / totals
    drawn = torch.binomial(totals.expand(resamples, -1), shares.expand(resamples, -1), generator=generator)
    return (drawn / totals).mean(dim=1)


def bootstrap_precision(scores: Tensor, targets: Tensor, *, resamples: int = 200, seed: int = 0) -> Tensor:
    """Mean average precisions of resampled pictures, (R,) fp64 in 0..1.

    Args:
        scores: (n, C) fp64, on the CPU; equal ones are one step of the curve, as in torchmetrics.
        targets: (n, C) bool, some of them true in each class; a class without any in a resample is left out of it.
        resamples: R.
        seed: of the draws.
    """
    return torch.cat([resampled_precision(scores, targets, times) for times in _draw(len(scores), resamples, seed)])


def resampled_precision(scores: Tensor, targets: Tensor, times: Tensor) -> Tensor:
    """The same for given resamples: how often each picture is in it, (R, n) fp64."""
    found = []
    for values, right in zip(scores.t(), targets.t(), strict=True):
        order = values.argsort(descending=True)
        ordered = -values[order]
        ends = torch.searchsorted(ordered, ordered, side="right") - 1  # of the pictures with equal scores
        drawn = times[:, order]
        hits = drawn * right[order]
        precision = hits.cumsum(dim=1)[:, ends] / drawn.cumsum(dim=1)[:, ends].clamp(min=1)
        found.append((hits * precision).sum(dim=1) / hits.sum(dim=1))
    return torch.stack(found).nanmean(dim=0)


def _draw(number: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """How often each of so many rows is in a resample, (some of R, number) fp64, drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    for part in torch.arange(resamples).split(max(1, _DRAWS_AT_ONCE // number)):
        drawn = torch.randint(number, (len(part), number), generator=generator)
        times = torch.zeros(len(part), number, dtype=torch.float64)
        yield times.scatter_add_(1, drawn, torch.ones_like(times))


def interval(resampled: Tensor, draws: int | None = None) -> tuple[float, float]:
    """The middle 95 % of resampled numbers, (R,).

    Args:
        resampled: percentages of queries that succeed, if `draws` is given.
        draws: queries, or groups of them, that were drawn: for the bound where all resamples are 0, or all are 100.
    """
    tail = (1 - LEVEL) / 2
    low, high = resampled.quantile(torch.tensor([tail, 1 - tail], dtype=resampled.dtype)).tolist()
    if draws and low == high and low in (0.0, 100.0):
        reach = 100.0 * (1 - tail ** (1 / draws))
        return (0.0, reach) if low == 0 else (100.0 - reach, 100.0)
    return low, high
