"""95 % intervals by the percentile bootstrap: what the number would be for other queries of the same kind.

It says how far the choice of queries moves a number; not how far another seed of training or other prompts would. At 0
and at 100 percent it has no width, and with few queries it is somewhat too narrow.

Letters: Q queries · K numbers of each · G groups · R resamples · C classes.

Reference: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3 (percentile); Davison and
Hinkley, Bootstrap Methods and their Application (1997), section 3.8 (groups drawn whole).
"""

from __future__ import annotations

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
    generator = torch.Generator().manual_seed(seed)
    number = len(both)
    found = []
    for part in torch.arange(resamples).split(max(1, _DRAWS_AT_ONCE // number)):
        drawn = torch.randint(number, (len(part), number), generator=generator)
        times = torch.zeros(len(part), number, dtype=torch.float64)
        found.append(times.scatter_add_(1, drawn, torch.ones_like(times)) @ both)
    sums = torch.cat(found)
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


def interval(resampled: Tensor) -> tuple[float, float]:
    """The middle 95 % of resampled numbers, (R,)."""
    tail = (1 - LEVEL) / 2
    low, high = resampled.quantile(torch.tensor([tail, 1 - tail], dtype=resampled.dtype)).tolist()
    return low, high
