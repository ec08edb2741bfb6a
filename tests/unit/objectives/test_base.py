"""Weights by step, against numpy's interpolation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m2_encoder.errors import UserError
from m2_encoder.objectives.base import Objective, ObjectiveInputs, ObjectiveOutput, check_schedule, find_pause

FACTORS = st.one_of(st.just(0.0), st.floats(0.0, 5.0, allow_subnormal=False))
SCHEDULES = st.dictionaries(st.integers(0, 60), FACTORS, min_size=1, max_size=5).filter(lambda s: any(s.values()))


class Constant(Objective):
    def forward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        return ObjectiveOutput(torch.tensor(1.0), torch.ones(1))


@given(SCHEDULES, st.integers(0, 80), st.floats(0.0, 3.0))
def test_the_weight_is_interpolated(schedule: dict[int, float], step: int, weight: float) -> None:
    points = sorted(schedule.items())
    expected = weight * np.interp(step, [point for point, _ in points], [factor for _, factor in points])
    found = Constant(weight=weight, schedule=schedule).weight_at(step)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


def test_without_a_schedule_the_weight_stays() -> None:
    assert {Constant(weight=0.3).weight_at(step) for step in (0, 10, 10_000)} == {0.3}


@given(st.lists(SCHEDULES, min_size=1, max_size=3))
def test_the_first_pause_is_found(schedules: list[dict[int, float]]) -> None:
    objectives = [Constant(schedule=schedule) for schedule in schedules]
    paused = [step for step in range(80) if not any(objective.weight_at(step) for objective in objectives)]
    assert find_pause([objective.schedule for objective in objectives]) == (paused[0] if paused else None)
    assert find_pause([*(objective.schedule for objective in objectives), None]) is None


@pytest.mark.parametrize(
    "schedule",
    [
        {},
        {0: 0},
        {0: -1.0, 5: 1.0},
        {-1: 1.0},
        {0.5: 1.0},
        {"x": 1.0},
        {0: "1"},
        {0: True},
        {0: float("inf")},
        {"²": 1.0},
        {True: 1.0},
        5,
        [0, 1],
        "late",
    ],
)
def test_senseless_schedules_are_refused(schedule: Any) -> None:
    with pytest.raises(UserError, match="schedule"):
        check_schedule(schedule)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_senseless_weights_are_refused(weight: float) -> None:
    with pytest.raises(UserError, match="must be 0 or more, and finite"):
        Constant(weight=weight)
