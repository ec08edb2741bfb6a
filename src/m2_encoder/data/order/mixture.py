"""Samples of each source in a block of positions: whole numbers with exact shares in the long run.

A block of 1,000 positions holds floor(1000 share) or ceil(1000 share) samples of a source, and all blocks before any
one together differ from its share by less than one sample. Which blocks round up is a schedule that repeats, so the
counts before any block are known at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

BLOCK = 1000
"""Positions of a block."""

_MAX_PERIOD = 1000  # blocks; shares that need more are rounded to parts per million
_MILLION = 1_000_000
_TIE_DEPTH = 64  # later deadlines that are compared where the first ones are equal


class Mixture:
    """Quotas of sources in blocks of positions.

    Args:
        weights: share of each source, 0 or more, not all 0; any unit. Shares that no 1,000 blocks in a row can meet
            exactly are rounded to parts per million, but never to nothing.

    Attributes:
        period: blocks after which the schedule repeats; every source then had its share exactly.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [Fraction(str(weight)) for weight in weights]
        assert sum(exact) > 0 <= min(exact), f"no mixture: {list(weights)}"
        shares = [weight / sum(exact) for weight in exact]
        self.period = math.lcm(*((BLOCK * share).denominator for share in shares))
        if self.period > _MAX_PERIOD:
            shares = _round_to_millionths(shares)
            self.period = math.lcm(*((BLOCK * share).denominator for share in shares))
        self._quotas = _schedule([BLOCK * share for share in shares], self.period)
        self._before = np.vstack([np.zeros(len(shares), np.int64), np.cumsum(self._quotas, axis=0)])

    def quotas(self, block: int) -> npt.NDArray[np.int64]:
        """Samples of each source in a block, (sources,)."""
        return self._quotas[block % self.period]

    def before(self, block: int) -> npt.NDArray[np.int64]:
        """Samples of each source in all blocks before this one, (sources,)."""
        periods, rest = divmod(block, self.period)
        return periods * self._before[-1] + self._before[rest]


def _round_to_millionths(shares: Sequence[Fraction]) -> list[Fraction]:
    """Largest remainders; a share above 0 keeps at least one part."""
    parts = [max(1, math.floor(share * _MILLION)) if share else 0 for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: parts[i] - shares[i] * _MILLION)
    missing = _MILLION - sum(parts)
    for i in by_remainder[: max(0, missing)]:
        parts[i] += 1
    parts[max(range(len(parts)), key=parts.__getitem__)] += min(0, missing)
    return [Fraction(part, _MILLION) for part in parts]


def _schedule(quotas: Sequence[Fraction], period: int) -> npt.NDArray[np.int64]:
    """Whole quotas of every block of a period, (period, sources).

    The fractions are scheduled like fair tasks on so many processors as they sum up to: of those that are due, the ones
    with the earliest deadlines round up. That keeps every count within one of its share (Baruah, Cohen, Plaxton,
    Varvel, "Proportionate progress", Algorithmica 1996).
    """
    table = np.tile(np.array([math.floor(quota) for quota in quotas], np.int64), (period, 1))
    steps = [int((quota - math.floor(quota)) * period) for quota in quotas]  # of a period, round up so often
    extra = sum(steps) // period
    done = [0] * len(steps)
    for block in range(period if extra else 0):
        due = [i for i, often in enumerate(steps) if often and done[i] * period // often <= block]
        if len(due) > extra:
            due = sorted(due, key=lambda i: _deadlines(done[i], steps[i], period))[:extra]
        for i in due:
            table[block, i] += 1
            done[i] += 1
    return table


def _deadlines(number: int, often: int, period: int) -> list[int]:
    """Block before which the next rounding up is due, then those after it as far as they decide ties."""
    found = []
    for later in range(number, min(often, number + _TIE_DEPTH)):
        deadline, rest = divmod((later + 1) * period, often)
        found += [deadline + (rest > 0), -(rest > 0)]
        if not rest:
            break
    return found
