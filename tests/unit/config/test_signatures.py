from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from m2_encoder.config.problems import UNSET
from m2_encoder.config.signatures import check_targets, describe


class Target:
    def __init__(
        self,
        size: int,
        *,
        rate: float = 0.1,
        mode: Literal["fast", "slow"] = "fast",
        tags: Sequence[str] = (),
        shares: Mapping[str, float] | None = None,
        inner: Target | None = None,
        late: str = "",
        path: Path | str = "x",
        odd: Unknown = 3,  # type: ignore[name-defined]  # noqa: F821
    ) -> None: ...


class Child(Target):
    def __init__(self, extra: bool = False, **settings: Any) -> None: ...


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under importlib mode this module has no name to import it by."""
    import types

    module = types.ModuleType("signature_targets")
    module.Target, module.Child, module.value = Target, Child, 3  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "signature_targets", module)


def _problems(given: Sequence[str] = (), name: str = "Target", **arguments: Any) -> list[str]:
    cfg = {"node": {"_target_": f"signature_targets.{name}", **arguments}}
    found = check_targets(cfg, given={"node": given}, skip=lambda _: False)
    assert all(problem.text.startswith(problem.key) for problem in found)
    return [problem.text for problem in found]


def test_good_arguments_pass() -> None:
    good: dict[str, Any] = {
        "size": 3, "rate": 1, "mode": "slow", "tags": ["a"], "shares": {"a": 0.5}, "path": "y", "odd": object(),
        "inner": {"_target_": "signature_targets.Target", "size": 1},
    }  # fmt: skip
    assert _problems(**good) == []
    assert _problems(size=UNSET, shares=None) == []


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("size", 1.5, "a whole number"),
        ("size", True, "a whole number"),
        ("size", "3", "a whole number"),
        ("rate", float("nan"), "a number"),
        ("rate", None, "a number"),
        ("mode", "medium", "one of fast, slow"),
        ("tags", "a", "a list of a text"),
        ("tags", [1], "a list of a text"),
        ("shares", {"a": "b"}, "a mapping or null"),
        ("inner", 3, "a Target or null"),
        ("rate", {"_target_": "signature_targets.Target", "size": 1}, "a number"),
    ],
)
def test_wrong_type(name: str, value: object, rule: str) -> None:
    arguments: dict[str, Any] = {"size": 1, name: value}
    (problem,) = _problems(**arguments)
    assert f"must be {rule}; " in problem
    assert problem.startswith(f"node.{name}=")


def test_unknown_missing_and_given_arguments_all_at_once() -> None:
    problems = _problems(given=("late",), ratte=1, late="x")
    assert len(problems) == 3
    assert "did you mean rate" in problems[0]
    assert "set by the command itself" in problems[1]
    assert problems[2] == "node.size: is missing; add node.size=1"


def test_a_partial_may_lack_what_comes_later() -> None:
    assert _problems(_partial_=True) == []
    assert len(_problems(given=("late",), _partial_=True)) == 1


def test_keyword_arguments_are_followed_to_the_parent() -> None:
    assert _problems(name="Child", size=1, extra=True, rate=0.5) == []
    (problem,) = _problems(name="Child", size=1, rat=0.5)
    assert "did you mean rate" in problem


def test_modules_without_a_constructor_take_nothing() -> None:
    node = {"_target_": "m2_encoder.objectives.patch_targets.NormalizedPixels", "tokenizer": "x"}
    (problem,) = check_targets({"node": node}, given={}, skip=lambda _: False)
    assert problem.text.startswith("node.tokenizer=x: unknown argument")


@pytest.mark.parametrize(
    "target", ["signature_targets.Nothing", "no.such.module", "signature_targets.value", 3, "", "."]
)
def test_target_that_is_none(target: object) -> None:
    (problem,) = check_targets({"node": {"_target_": target}}, given={}, skip=lambda _: False)
    assert problem.key == "node._target_"


def test_nested_targets_are_found() -> None:
    inner = {"_target_": "signature_targets.Target", "sise": 1}
    found = check_targets({"a": [{"b": inner}]}, given={}, skip=lambda _: False)
    assert [problem.key for problem in found] == ["a[0].b.sise", "a[0].b.size"]


def test_data_parallel_options_pass_through() -> None:
    node = {"_target_": "m2_encoder.strategies.grouped_ddp.GroupedDDPStrategy", "find_unused_parameters": True}
    assert check_targets({"strategy": node}, given={}, skip=lambda _: False) == []
    node["find_unused_parameter"] = node.pop("find_unused_parameters")
    (problem,) = check_targets({"strategy": node}, given={}, skip=lambda _: False)
    assert "did you mean find_unused_parameters" in problem.text


def test_describe_names_every_part() -> None:
    assert describe(int | None) == "a whole number or null"
    assert describe(dict[str, int]) == "a mapping"
    assert describe(Literal["a", 3]) == "one of a, 3"
