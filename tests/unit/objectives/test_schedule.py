"""Numbers by step, against numpy's interpolation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2_encoder.errors import UserError
from m2_encoder.objectives.schedule import check_points, check_schedule, ever_active, find_pause, interpolate_schedule

FACTORS = st.one_of(st.just(0.0), st.floats(0.0, 5.0, allow_subnormal=False))
SCHEDULES = (
    st.lists(st.tuples(st.integers(0, 60), FACTORS), min_size=1, max_size=5, unique_by=lambda pair: pair[0])
    .filter(lambda pairs: any(factor for _, factor in pairs))
    .map(lambda pairs: [list(pair) for pair in pairs])
)


@given(SCHEDULES, st.integers(0, 80))
def test_numbers_are_interpolated(schedule: list[list[float]], step: int) -> None:
    points = sorted(schedule)
    expected = np.interp(step, [point for point, _ in points], [factor for _, factor in points])
    np.testing.assert_allclose(interpolate_schedule(check_schedule(schedule), step), expected, rtol=1e-12, atol=1e-15)


@given(SCHEDULES)
def test_a_mapping_of_an_old_configuration_is_the_same(schedule: list[list[float]]) -> None:
    pairs = check_schedule(schedule)
    assert check_schedule(dict(schedule)) == pairs
    assert check_schedule({str(step): factor for step, factor in schedule}) == pairs


@given(st.lists(SCHEDULES, min_size=1, max_size=3))
def test_the_first_pause_is_found(schedules: list[list[list[float]]]) -> None:
    checked = [check_schedule(schedule) for schedule in schedules]
    paused = [step for step in range(80) if not any(interpolate_schedule(each, step) for each in checked)]
    assert find_pause(checked) == (paused[0] if paused else None)
    assert find_pause([*checked, None]) is None
    assert all(
        ever_active(each, steps) == any(interpolate_schedule(each, s) for s in range(steps))
        for each in checked
        for steps in (1, 10, 61)
    )


@pytest.mark.parametrize(
    "schedule",
    [
        [],
        [[0, 0]],
        [[0, -1.0], [5, 1.0]],
        [[-1, 1.0]],
        [[0.5, 1.0]],
        [["x", 1.0]],
        [[0, "1"]],
        [[0, True]],
        [[0, float("inf")]],
        [["²", 1.0]],
        [[True, 1.0]],
        [[0, 1], [0, 2]],
        [[0, 1, 2]],
        {},
        {0: 0},
        {-1: 1.0},
        {"x": 1.0},
        5,
        [0, 1],
        "late",
        None,
    ],
)
def test_senseless_schedules_are_refused(schedule: Any) -> None:
    with pytest.raises(UserError, match="schedule=") as caught:
        check_schedule(schedule)
    assert (caught.value.key, caught.value.value) == ("schedule", schedule)


def test_points_may_all_be_zero() -> None:
    assert check_points([[0, 0]], key="softness") == {0: 0.0}
