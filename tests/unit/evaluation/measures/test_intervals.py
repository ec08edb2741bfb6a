"""Intervals cover the true number as often as they say: by simulation, where the true number is known."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.functional.classification import multilabel_average_precision

from m2_encoder.evaluation.measures.intervals import (
    bootstrap_class_means,
    bootstrap_means,
    interval,
    resampled_precision,
)

TRIALS = 200


def covered(bounds: tuple[float, float], truth: float) -> bool:
    return bounds[0] <= truth <= bounds[1]


@pytest.mark.parametrize(("truth", "queries"), [(0.5, 100), (0.1, 250)])
def test_intervals_of_single_queries_cover(truth: float, queries: int) -> None:
    hits = (torch.rand(TRIALS, queries) < truth).long()
    shares = [
        covered(interval(bootstrap_means(trial[:, None], resamples=300, seed=number)[:, 0]), truth)
        for number, trial in enumerate(hits)
    ]
    assert 0.9 <= sum(shares) / TRIALS <= 0.99


def test_intervals_of_captions_that_share_a_picture_cover_only_if_drawn_together() -> None:
    """Each picture has a chance of its own, which its five captions share."""
    pictures, groups = 80, torch.arange(80).repeat_interleave(5)
    chances = torch.rand(TRIALS, pictures) ** 2  # mean 1 / 3
    hits = (torch.rand(TRIALS, pictures, 5) < chances[..., None]).flatten(1)
    together, alone = 0, 0
    for number, trial in enumerate(hits):
        both = [bootstrap_means(trial[:, None], which, resamples=300, seed=number) for which in (groups, None)]
        together += covered(interval(both[0][:, 0]), 1 / 3)
        alone += covered(interval(both[1][:, 0]), 1 / 3)
    assert 0.9 <= together / TRIALS <= 0.99
    assert alone / TRIALS < 0.85


def test_intervals_of_means_over_classes_cover() -> None:
    truths, totals = torch.rand(12) * 0.8 + 0.1, torch.randint(8, 40, (12,))
    hits = torch.binomial(totals.float().expand(TRIALS, 12), truths.expand(TRIALS, 12)).long()
    shares = [
        covered(interval(bootstrap_class_means(trial, totals, resamples=300, seed=number)), float(truths.mean()))
        for number, trial in enumerate(hits)
    ]
    assert 0.9 <= sum(shares) / TRIALS <= 0.99


def test_means_are_those_of_drawing_rows() -> None:
    """Spread and centre of a mean with known variance, several numbers at once, groups of unequal size."""
    values = torch.randn(400, 2).double() + torch.tensor([0.0, 5.0])
    found = bootstrap_means(values, resamples=3000)
    assert found.mean(dim=0).tolist() == pytest.approx(values.mean(dim=0).tolist(), abs=0.01)
    assert found.std(dim=0).tolist() == pytest.approx((values.std(dim=0) / 20).tolist(), rel=0.06)
    groups = torch.tensor([7, 7, 7, 2])
    drawn = bootstrap_means(torch.tensor([[1.0], [1.0], [1.0], [0.0]]), groups, resamples=500)
    assert set(drawn[:, 0].tolist()) == {0.0, 0.75, 1.0}


def test_resampled_precision_equals_torchmetrics_on_repeated_pictures() -> None:
    scores = torch.rand(60, 3).double().round(decimals=1)  # with many equal scores
    targets = torch.rand(60, 3) < 0.3
    times = torch.stack([torch.ones(60), torch.bincount(torch.randint(60, (60,)), minlength=60)]).double()
    for row, found in zip(times, resampled_precision(scores, targets, times).tolist(), strict=True):
        rows = torch.arange(60).repeat_interleave(row.long())
        expected = multilabel_average_precision(scores[rows], targets[rows].long(), num_labels=3)
        assert found == pytest.approx(float(expected), abs=1e-6)


def test_equal_seeds_draw_equal_rows() -> None:
    values = torch.randn(50, 1)
    assert torch.equal(bootstrap_means(values, seed=1), bootstrap_means(values, seed=1))
    assert not torch.equal(bootstrap_means(values, seed=1), bootstrap_means(values, seed=2))


@pytest.mark.parametrize("queries", [1, 7, 200])
def test_none_and_all_have_the_exact_binomial_bound(queries: int) -> None:
    none = bootstrap_means(torch.zeros(queries, 1), resamples=50)[:, 0]
    low, high = interval(100 * none, queries)
    assert low == 0.0
    # With this share of successes, no success at all comes in 2.5 % of all trials.
    assert (1 - high / 100) ** queries == pytest.approx(0.025)
    assert interval(100 * (1 - none), queries) == pytest.approx((100 - high, 100.0))
    assert interval(none) == (0.0, 0.0), "numbers that are no shares"
