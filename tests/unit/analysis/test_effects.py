"""What can be told apart over seeds, by numbers that a calculator gives."""

from __future__ import annotations

import itertools
import math

import pytest

from m2_encoder.analysis.effects import Scored, compare_all, compare_levels, half_interval

FACTORS = ["lr", "k"]


def _scores(effect: dict[int, float], seeds: tuple[int, ...] = (0, 1, 2)) -> list[Scored]:
    """lr=0.2 is above lr=0.1 by `effect` of the seed, whatever k is; k does nothing; seeds differ by 100 each."""
    return [
        Scored({"lr": lr, "k": k, "seed": seed}, 100.0 * seed + (effect[seed] if lr == 0.2 else 0.0))
        for lr, k, seed in itertools.product((0.1, 0.2), (1, 2), seeds)
    ]


def test_pairs_of_equal_seed_are_compared() -> None:
    """Differences 1, 2 and 3: mean 2, deviation 1, t of two degrees 4.303."""
    (found,) = compare_levels(_scores({0: 1.0, 1: 2.0, 2: 3.0}), "lr", FACTORS)
    assert (found.better, found.other, found.seeds, found.pairs) == (0.2, 0.1, 3, 6)
    assert found.difference == pytest.approx(2.0)
    assert found.interval == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    assert not found.is_told_apart
    assert str(found) == "lr: 0.2 and 0.1 cannot be told apart (2.00 ± 2.48)"
    assert found.seeds_for(2.48) == 4
    assert found.seeds_for(1.0) == 7  # 2.447 / sqrt(7) = 0.92, 2.571 / sqrt(6) = 1.05


def test_what_can_be_told_apart_comes_first() -> None:
    first, second = compare_all(_scores({0: 1.9, 1: 2.0, 2: 2.1}), FACTORS)
    assert (first.factor, first.is_told_apart, second.factor, second.is_told_apart) == ("lr", True, "k", False)
    assert str(first) == "lr: 0.2 is better than 0.1 by 2.00 ± 0.25"
    assert (second.difference, second.interval) == (0, 0)
    assert str(second) == "k: 1 and 2 give the same score"


def test_one_seed_tells_nothing_apart() -> None:
    (found,) = compare_levels(_scores({0: 50.0}, seeds=(0,)), "lr", FACTORS)
    assert found.interval is None
    assert found.seeds_for(1) is None
    assert str(found) == "lr: 0.2 is 50.00 above 0.1 at one seed, by chance or not"


def test_runs_without_a_partner_do_not_count() -> None:
    """Only seed 0 has both levels; over all runs, lr=0.1 would seem better by far."""
    scored = [
        Scored({"lr": 0.1, "seed": 0}, 1.0), Scored({"lr": 0.2, "seed": 0}, 2.0), Scored({"lr": 0.1, "seed": 1}, 90.0),
    ]  # fmt: skip
    (found,) = compare_levels(scored, "lr", ["lr"])
    assert (found.better, found.difference, found.pairs) == (0.2, 1.0, 1)
    (none,) = compare_levels([scored[1], scored[2]], "lr", ["lr"])
    assert str(none) == "lr: no two runs differ in 0.1 and 0.2 alone"


def test_interval_of_many_values() -> None:
    values = [0.0, 1.0] * 50
    assert half_interval(values) == pytest.approx(1.96 * 0.502519 / 10, rel=1e-3)
    assert half_interval([1.0]) is None
