"""What a factor of several runs does, over seeds: differences of pairs, with an interval, and in words.

Runs are compared with those that differ from them in one factor alone, at the same seed: what a seed does to all of
them cancels. For each seed the differences are averaged over the other factors, so that a seed is one observation; the
interval is Student's t over seeds. One seed gives none: then nothing can be told apart.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from m2_encoder.analysis.table import show_value

SEED: Final = "seed"
_QUANTILES: Final = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Of Student's t, two-sided 95 %, for 1 to 30 degrees of freedom."""
_NORMAL: Final = 1.960
_SAME: Final = 5e-3  # what two decimals show as 0


class Scored(NamedTuple):
    """A run as it is compared: its settings, and one number."""

    settings: Mapping[str, Any]
    score: float


class Difference(NamedTuple):
    """Two levels of a factor."""

    factor: str
    better: Any  # the level with the higher mean
    other: Any
    difference: float  # mean over seeds, better minus other
    interval: float | None  # half of the 95 % interval; None for one seed
    seeds: int  # that have pairs
    pairs: int  # of runs that differ in this factor alone

    @property
    def is_told_apart(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.interval is not None and self.difference > self.interval

    @property
    def title(self) -> str:
        """What is compared, in a few words."""
        return f"{self.factor}: {show_value(self.better) or 'null'} over {show_value(self.other) or 'null'}"

    def seeds_for(self, points: float) -> int | None:
        """About how many seeds it takes to tell a difference of so many points from chance; None for one seed."""
        if self.interval is None:
            return None
        deviation = self.interval * math.sqrt(self.seeds) / _quantile(self.seeds - 1)
        return next(n for n in itertools.count(2) if _quantile(n - 1) * deviation <= points * math.sqrt(n))

    def __str__(self) -> str:
        better, other = (show_value(level) or "null" for level in (self.better, self.other))
        if self.pairs == 0:
            return f"{self.factor}: no two runs differ in {better} and {other} alone"
        if max(self.difference, self.interval or 0.0) < _SAME:
            return f"{self.factor}: {better} and {other} give the same score"
        if self.interval is None:
            return f"{self.factor}: {better} is {self.difference:.2f} above {other} at one seed, by chance or not"
        by = f"{self.difference:.2f} ± {self.interval:.2f}"
        if self.is_told_apart:
            return f"{self.factor}: {better} is better than {other} by {by}"
        return f"{self.factor}: {better} and {other} cannot be told apart ({by})"


def compare_levels(scored: Sequence[Scored], factor: str, factors: Sequence[str]) -> list[Difference]:
    """The best level of a factor against each other one, in the order of their means.

    Args:
        scored: runs.
        factor: which is compared.
        factors: all that vary, but the seed.
    """
    others = [key for key in factors if key != factor]
    cells: dict[tuple[str, str, str], list[float]] = {}
    levels: dict[str, Any] = {}
    for settings, score in scored:
        level = repr(settings.get(factor))
        levels.setdefault(level, settings.get(factor))
        place = repr([settings.get(key) for key in others])
        cells.setdefault((level, place, repr(settings.get(SEED))), []).append(score)
    means = {cell: statistics.fmean(scores) for cell, scores in cells.items()}
    ranked = sorted(levels, key=lambda level: -statistics.fmean(v for cell, v in means.items() if cell[0] == level))
    return [_difference(means, factor, (ranked[0], other), levels) for other in ranked[1:]]


def _difference(
    means: Mapping[tuple[str, str, str], float], factor: str, two: tuple[str, str], levels: Mapping[str, Any]
) -> Difference:
    by_seed: dict[str, list[float]] = {}
    for (level, place, seed), value in means.items():
        if level == two[0] and (two[1], place, seed) in means:
            by_seed.setdefault(seed, []).append(value - means[two[1], place, seed])
    observed = [statistics.fmean(values) for values in by_seed.values()]
    found = statistics.fmean(observed) if observed else math.nan
    # Over the pairs alone the order may be another one than over all runs.
    better, other = two if not found < 0 else two[::-1]
    pairs = sum(map(len, by_seed.values()))
    return Difference(factor, levels[better], levels[other], abs(found), half_interval(observed), len(observed), pairs)


def half_interval(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of a mean, by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    return _quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def _quantile(freedom: int) -> float:
    return _QUANTILES[freedom - 1] if freedom <= len(_QUANTILES) else _NORMAL


def compare_all(scored: Sequence[Scored], factors: Sequence[str]) -> list[Difference]:
    """`compare_levels` of every factor: what can be told apart first, then by size."""
    found = itertools.chain.from_iterable(compare_levels(scored, factor, factors) for factor in factors)
    return sorted(found, key=lambda each: (not each.is_told_apart, each.pairs == 0, -each.difference))
