"""The greedy recipe on models of one number, whose score is known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.runs.soup import choose_greedily
from tests.support.models import random_model, small_config

_BEST = 1.0  # the value of logit_scale that scores most


def _model(value: float) -> M2Encoder:
    model = random_model(small_config())
    with torch.no_grad():
        model.logit_scale.fill_(value)
    return model


def _score(model: M2Encoder) -> float:
    return -abs(float(model.logit_scale.detach()) - _BEST)


def _recipe(values: Sequence[float]) -> set[int]:
    """Recipe 1 of the paper, with means of numbers."""
    order = sorted(range(len(values)), key=lambda i: abs(values[i] - _BEST))
    soup = [order[0]]
    for index in order[1:]:
        mean = sum(values[i] for i in [*soup, index]) / (len(soup) + 1)
        if abs(mean - _BEST) <= abs(sum(values[i] for i in soup) / len(soup) - _BEST):
            soup.append(index)
    return set(soup)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [([1.5, 0.5], {0, 1}), ([1.0, 3.0], {0}), ([3.0, 1.25, 0.5], {1, 2}), ([2.0], {0}), ([4.0, 1.5, 1.75], {1})],
)
def test_a_model_stays_if_the_mean_scores_no_less(values: list[float], wanted: set[int]) -> None:
    models = [_model(value) for value in values]
    soup = choose_greedily(models.__getitem__, len(models), _score)
    assert {index for index, share in enumerate(soup.shares) if share} == wanted == _recipe(values)
    assert all(share in (0, 1 / len(wanted)) for share in soup.shares)
    assert soup.alone == pytest.approx([-abs(value - _BEST) for value in values])
    assert soup.mixed >= max(soup.alone)


@settings(max_examples=15)
@given(st.lists(st.integers(-8, 8), min_size=1, max_size=4))
def test_a_soup_is_never_worse_than_its_best_model(values: list[int]) -> None:
    models = [_model(value / 4) for value in values]
    soup = choose_greedily(models.__getitem__, len(models), _score)
    assert sum(soup.shares) == pytest.approx(1)
    assert soup.mixed >= max(soup.alone) - 1e-6
