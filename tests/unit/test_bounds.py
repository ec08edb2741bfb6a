from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Le, Len, Lt
from hypothesis import given
from hypothesis import strategies as st

from m2_encoder.bounds import Count, Fraction, Rule, check_bounds, check_fields, describe, fits
from m2_encoder.errors import UserError

JUNK: list[Any] = ["3", "abc", "", True, None, [], {}, [1], float("nan"), float("inf"), -float("inf")]
Share = Annotated[float, Ge(0), Lt(1)]
Pair = Annotated[Sequence[Share], Len(2, 2)]
Weights = Annotated[
    Mapping[Literal["en", "zh"], Annotated[float, Ge(0)]],
    Rule(lambda weights: any(weights.values()), "not all 0"),
]


@given(value=st.floats(-3, 3), bound=st.floats(-2, 2))
def test_numbers_keep_their_bounds(value: float, bound: float) -> None:
    assert fits(value, Annotated[float, Gt(bound)]) == (value > bound)
    assert fits(value, Annotated[float, Ge(bound)]) == (value >= bound)
    assert fits(value, Annotated[float, Lt(bound)]) == (value < bound)
    assert fits(value, Annotated[float, Le(bound)]) == (value <= bound)


@pytest.mark.parametrize("value", JUNK, ids=repr)
@pytest.mark.parametrize("annotation", [Count, Fraction], ids=["whole", "number"])
def test_junk_is_no_number(annotation: Any, value: object) -> None:
    assert not fits(value, annotation)
    assert fits(value, annotation | None) == (value is None)


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        (Pair, [[0, 0.5], (0.9, 0.98)], [[0.9], [0.9, 1.0], "ab", 0.5]),
        (Literal["a", 3], ["a", 3], ["b", 3.0, None]),
        (Weights, [{"en": 1}, {"en": 0, "zh": 0.5}], [{"en": 0}, {"fr": 1}, {"en": -1}, {}, 3]),
    ],
)
def test_what_is_made_of_numbers_and_words(annotation: Any, good: list[object], bad: list[object]) -> None:
    assert all(fits(value, annotation) for value in good)
    assert not any(fits(value, annotation) for value in bad)


def test_annotations_in_words() -> None:
    assert describe(Count | None) == "a whole number, 1 or more, or null"
    assert describe(Count | None, 10**23) == "a whole number, in 1..1000000000, or null"
    assert describe(Annotated[Count, Le(9)]) == "a whole number, in 1..9"
    assert describe(Annotated[int, Ge(0), Le(9)]) == "a whole number, in 0..9"
    assert describe(Annotated[float, Gt(0), Le(10)]) == "a number, above 0 and at most 10"
    assert describe(Pair) == "2 numbers, each 0 or more and below 1"
    assert describe(Weights) == "not all 0"
    assert describe(dict[str, int] | None) == "a mapping or null"
    assert describe(Literal["a", 3]) == "one of a, 3"


@check_bounds
def _build(module: object, *, lr: Annotated[float, Gt(0)], mode: Literal["a", "b"] = "a") -> float:
    return lr


def test_functions_refuse_what_their_annotations_do() -> None:
    assert _build(None, lr=1) == 1
    with pytest.raises(UserError, match="lr=-1: must be a number, above 0") as caught:
        _build(None, lr=-1)
    assert (caught.value.key, caught.value.value) == ("lr", -1)
    with pytest.raises(UserError) as several:
        _build(None, lr=0, mode="c")  # type: ignore[arg-type]
    assert [problem.key for problem in several.value.problems] == ["lr", "mode"]


def test_dataclasses_refuse_what_their_annotations_do() -> None:
    @dataclasses.dataclass
    class Shape:
        size: Count

        def __post_init__(self) -> None:
            check_fields(self)

    assert Shape(2).size == 2
    with pytest.raises(UserError, match="size=0: must be a whole number, 1 or more"):
        Shape(0)
