from __future__ import annotations

import pytest

from m2_encoder.config.problems import find_problems, format_problem, show
from m2_encoder.errors import NOTHING, Problem, UserError


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "null"),
        (True, "true"),
        ("abc", "abc"),
        ("3", '"3"'),
        ("", '""'),
        (1e-3, "0.001"),
        ([1, "2"], '[1, "2"]'),
        ({"a": None}, "{a: null}"),
    ],
)
def test_values_are_shown_as_typed(value: object, shown: str) -> None:
    assert show(value) == shown


def test_a_line_names_key_value_rule_and_fix() -> None:
    assert format_problem(Problem("a.b", -1, "must be 2 or more", "for example a.b=5")) == (
        "a.b=-1: must be 2 or more; for example a.b=5"
    )
    assert format_problem(Problem("a.b", NOTHING, "is missing", "add a.b=5")) == "a.b: is missing; add a.b=5"
    assert format_problem(Problem("a", None, "no such file")) == "a=null: no such file"
    assert format_problem(Problem("", NOTHING, "nothing could be read")) == "nothing could be read"


def test_an_error_is_one_problem_or_several() -> None:
    assert find_problems(UserError("must be\n  above 0", key="lr", value=-1).under("optimizer")) == [
        Problem("optimizer.lr", -1, "must be above 0")
    ]
    several = (Problem("a", 1, "x"), Problem("b", 2, "y"))
    assert find_problems(UserError("x; y", problems=several).under("c")) == [
        Problem("c.a", 1, "x"), Problem("c.b", 2, "y")
    ]  # fmt: skip
