"""Schedules: numbers by step, linear between the given steps and constant beyond them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Final, TypeAlias, TypeGuard

from m2_encoder.bounds import Rule
from m2_encoder.errors import UserError

_STEP_DIGITS: Final = 9
_MOST: Final = 10**9

Schedule: TypeAlias = Annotated[
    Sequence[Sequence[float]] | Mapping[Any, float],
    Rule(lambda _: True, "pairs of a step and a number", "[[0,0],[1000,1]]"),  # of which `check_points` asks more
]
"""Pairs of a step and a number, `[[0, 0], [1000, 1]]`. Old configurations have a mapping, `{0: 0, 1000: 1}`."""


def check_schedule(schedule: Any) -> dict[int, float]:
    """As `check_points`, for factors of a weight; also refuses a schedule that is 0 at every step."""
    points = check_points(schedule, key="schedule")
    if not any(points.values()):
        raise UserError(
            "is 0 at every step; give for example schedule=[[0,0],[1000,1]]", key="schedule", value=schedule
        )
    return points


def check_points(schedule: Any, *, key: str) -> dict[int, float]:
    """A schedule with its steps in order.

    Raises:
        UserError: if it has no pairs, a step twice, or a step or number that is negative or beyond 10^9.
    """
    pairs = list(schedule.items()) if isinstance(schedule, Mapping) else schedule
    points: dict[int, float] = {}
    for pair in pairs if pairs and _is_sequence(pairs) else [None]:
        if not _is_point(pair) or int(pair[0]) in points:
            rule = f"must be pairs of a step and a number, each in 0..{_MOST}, as in {key}=[[0,0],[1000,1]]"
            raise UserError(rule, key=key, value=schedule)
        points[int(pair[0])] = float(pair[1])
    return dict(sorted(points.items()))


def _is_sequence(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_point(pair: Any) -> TypeGuard[Sequence[Any]]:
    if not _is_sequence(pair) or len(pair) != 2:
        return False
    is_number = isinstance(pair[1], int | float) and not isinstance(pair[1], bool)
    is_step = str(pair[0]).isdecimal() and len(str(pair[0])) <= _STEP_DIGITS
    return is_step and is_number and 0 <= pair[1] <= _MOST


def find_pause(schedules: Iterable[Mapping[int, float] | None]) -> int | None:
    """The first step at which all of these checked schedules are 0; None if there is none.

    Numbers are not negative and linear in between: if all are 0 anywhere, they are at a given step of some schedule.

    Args:
        schedules: None for one that is never 0.
    """
    found = []
    for schedule in schedules:
        if schedule is None:
            return None
        found.append(schedule)
    steps = sorted({0}.union(*found))
    return next((step for step in steps if not any(interpolate_schedule(each, step) for each in found)), None)


def ever_active(schedule: Mapping[int, float], steps: int) -> bool:
    """Whether a checked schedule is above 0 at one of the first `steps` steps."""
    looked_at = {0, steps - 1, *(step for step in schedule if step < steps)}
    return any(interpolate_schedule(schedule, step) > 0 for step in looked_at)


def interpolate_schedule(schedule: Mapping[int, float], step: int) -> float:
    """The number at a step of a checked schedule."""
    points = list(schedule.items())
    if step <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in itertools.pairwise(points):
        if step < right:
            return low + (high - low) * (step - left) / (right - left)
    return points[-1][1]
