"""Intervals cover the true number as often as they say: by simulation, where the true number is known."""

from __future__ import annotations

import pytest
import torch

from m2_encoder.evaluation.measures.intervals import bootstrap_class_means, bootstrap_means, interval

TRIALS = 300


def covered(bounds: tuple[float, float], truth: float) -> bool:
    return bounds[0] <= truth <= bounds[1]


@pytest.mark.parametrize(("truth", "queries"), [(0.5, 200), (0.85, 300), (0.1, 400)])
def test_intervals_of_single_queries_cover(truth: float, queries: int) -> None:
    hits = (torch.rand(TRIALS, queries) < truth).long()
    shares = [
        covered(interval(bootstrap_means(trial[:, None], resamples=400, seed=number)[:, 0]), truth)
        for number, trial in enumerate(hits)
    ]
    assert 0.91 <= sum(shares) / TRIALS <= 0.985


def test_intervals_of_captions_that_share_a_picture_cover_only_if_drawn_together() -> None:
    """Each picture has a chance of its own, which its five captions share."""
    pictures, groups = 120, torch.arange(120).repeat_interleave(5)
    chances = torch.rand(TRIALS, pictures) ** 2  # mean 1 / 3
    hits = (torch.rand(TRIALS, pictures, 5) < chances[..., None]).flatten(1)
    together, alone = 0, 0
    for number, trial in enumerate(hits):
        both = [bootstrap_means(trial[:, None], which, resamples=400, seed=number) for which in (groups, None)]
        together += covered(interval(both[0][:, 0]), 1 / 3)
        alone += covered(interval(both[1][:, 0]), 1 / 3)
    assert 0.91 <= together / TRIALS <= 0.985
    assert alone / TRIALS < 0.85


def test_intervals_of_means_over_classes_cover() -> None:
    truths, totals = torch.rand(12) * 0.8 + 0.1, torch.randint(8, 40, (12,))
    hits = torch.binomial(totals.float().expand(TRIALS, 12), truths.expand(TRIALS, 12)).long()
    shares = [
        covered(interval(bootstrap_class_means(trial, totals, resamples=400, seed=number)), float(truths.mean()))
        for number, trial in enumerate(hits)
    ]
    assert 0.91 <= sum(shares) / TRIALS <= 0.985


def test_means_are_those_of_drawing_rows() -> None:
    """Spread and centre of a mean with known variance, several numbers at once, groups of unequal size."""
    values = torch.randn(400, 2).double() + torch.tensor([0.0, 5.0])
    found = bootstrap_means(values, resamples=4000)
    assert found.mean(dim=0).tolist() == pytest.approx(values.mean(dim=0).tolist(), abs=0.01)
    assert found.std(dim=0).tolist() == pytest.approx((values.std(dim=0) / 20).tolist(), rel=0.06)
    groups = torch.tensor([7, 7, 7, 2])
    drawn = bootstrap_means(torch.tensor([[1.0], [1.0], [1.0], [0.0]]), groups, resamples=500)
    assert set(drawn[:, 0].tolist()) == {0.0, 0.75, 1.0}


def test_equal_seeds_draw_equal_rows() -> None:
    values = torch.randn(50, 1)
    assert torch.equal(bootstrap_means(values, seed=1), bootstrap_means(values, seed=1))
    assert not torch.equal(bootstrap_means(values, seed=1), bootstrap_means(values, seed=2))
