from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2_encoder.config.problems import UNSET, show
from m2_encoder.config.rules import Rule, check_rules, choice, flag, number, select, text, whole
from m2_encoder.config.schema import TRAIN_RULES

JUNK: list[Any] = ["3", "abc", "", True, False, [], {}, [1], {"a": 1}, float("nan"), float("inf"), -float("inf")]


@given(least=st.integers(-5, 5), value=st.integers(-10, 10), most=st.integers(5, 8))
def test_whole_keeps_its_bounds(least: int, value: int, most: int) -> None:
    rule = whole("n", least, "1", most=most)
    assert rule.holds(value) == (least <= value <= most)


@given(value=st.floats(-3, 3), bound=st.floats(-2, 2))
def test_number_keeps_its_bounds(value: float, bound: float) -> None:
    assert number("x", "1", above=bound).holds(value) == (value > bound)
    assert number("x", "1", least=bound).holds(value) == (value >= bound)
    assert number("x", "1", below=bound).holds(value) == (value < bound)
    assert number("x", "1", most=bound).holds(value) == (value <= bound)


@pytest.mark.parametrize("value", JUNK, ids=repr)
@pytest.mark.parametrize("rule", [whole("k", 0, "1"), number("k", "1", least=0)], ids=["whole", "number"])
def test_junk_is_no_number(rule: Rule, value: object) -> None:
    assert not rule.holds(value)


@pytest.mark.parametrize("optional", [True, False])
def test_null_only_where_it_is_optional(optional: bool) -> None:
    rules = [
        whole("k", 0, "1", optional=optional), number("k", "1", optional=optional), text("k", "a", optional=optional)
    ]  # fmt: skip
    assert [rule.holds(None) for rule in rules] == [optional] * 3


def test_choice_and_flag() -> None:
    assert choice("k", ("a", "b")).holds("b")
    assert not any(choice("k", ("a", "b")).holds(value) for value in ("c", ["a"], None, 1))
    assert flag("k").holds(False)
    assert not any(flag("k").holds(value) for value in (0, 1, "true", None))


def test_message_names_key_value_rule_and_fix() -> None:
    (problem,) = check_rules({"a": {"b": -1}}, [whole("a.b", 2, "5")])
    assert problem.key == "a.b"
    assert problem.text == "a.b=-1: must be a whole number, 2 or more; for example a.b=5"


def test_missing_and_unset_values_are_left_alone() -> None:
    rules = [whole("a.b", 2, "5"), whole("a.c", 2, "5"), whole("d.e.f", 2, "5")]
    assert check_rules({"a": {"b": UNSET}, "d": 3}, rules) == []


def test_select_expands_any_name() -> None:
    cfg = {"objective": {"itc": {"weight": 1}, "cmlm": {"weight": 2}, "odd": 3}}
    found = dict(select(cfg, "objective.*.weight"))
    assert found == {"objective.itc.weight": 1, "objective.cmlm.weight": 2}


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


def test_examples_of_the_table_keep_their_own_rules() -> None:
    import yaml
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    for rule in TRAIN_RULES:
        # Quotes around a mapping are for the shell, which takes them away; around text they are Hydra's.
        typed = rule.example[1:-1] if rule.example.startswith("'{") else rule.example
        value = parser.parse_override(f"key={typed}").value()
        assert rule.holds(value), f"{rule.key}={rule.example}"
        assert yaml.safe_load(rule.example) is not None or rule.example == "null"


def test_every_rule_refuses_something() -> None:
    for rule in TRAIN_RULES:
        assert any(not rule.holds(value) for value in (*JUNK, -7, 1.5)), rule.key
