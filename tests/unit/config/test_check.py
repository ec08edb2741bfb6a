from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from m2_encoder.bounds import Count, KeysOf, NotNegative, Positive
from m2_encoder.cli.data_check import SurveySettings
from m2_encoder.cli.data_stats import StatsSettings
from m2_encoder.config.check import check_settings, check_targets, make_settings, read_parameters
from m2_encoder.config.problems import UNSET, format_problem
from m2_encoder.errors import Problem, UserError


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
    module.Plain = type("Plain", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "signature_targets", module)


def _problems(given: Sequence[str] = (), name: str = "Target", **arguments: Any) -> list[str]:
    cfg = {"node": {"_target_": f"signature_targets.{name}", **arguments}}
    return [format_problem(problem) for problem in check_targets(cfg, given={"node": given})]


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
        ("tags", "a", "a list of texts"),
        ("tags", [1], "a list of texts"),
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


def test_a_class_without_a_constructor_has_no_arguments() -> None:
    assert _problems(name="Plain") == []
    assert _problems(name="Plain", rank=3) == [
        "node.rank=3: unknown argument; signature_targets.Plain has no arguments; ~node.rank leaves it out"
    ]


def test_a_partial_may_lack_what_comes_later() -> None:
    assert _problems(_partial_=True) == []
    assert len(_problems(given=("late",), _partial_=True)) == 1


def test_keyword_arguments_are_followed_to_the_parent() -> None:
    assert _problems(name="Child", size=1, extra=True, rate=0.5) == []
    (problem,) = _problems(name="Child", size=1, rat=0.5)
    assert "did you mean rate" in problem


def test_modules_without_a_constructor_take_nothing() -> None:
    node = {"_target_": "m2_encoder.objectives.patch_targets.NormalizedPixels", "tokenizer": "x"}
    (problem,) = check_targets({"node": node}, given={})
    assert format_problem(problem).startswith("node.tokenizer=x: unknown argument")


@pytest.mark.parametrize(
    "target", ["signature_targets.Nothing", "no.such.module", "signature_targets.value", 3, "", "."]
)
def test_target_that_is_none(target: object) -> None:
    (problem,) = check_targets({"node": {"_target_": target}}, given={})
    assert problem.key == "node._target_"


def test_nested_targets_are_found() -> None:
    inner = {"_target_": "signature_targets.Target", "sise": 1}
    found = check_targets({"a": [{"b": inner}]}, given={})
    assert [problem.key for problem in found] == ["a[0].b.sise", "a[0].b.size"]


def test_data_parallel_options_pass_through() -> None:
    node = {"_target_": "m2_encoder.strategies.grouped_ddp.GroupedDDPStrategy", "find_unused_parameters": True}
    assert list(check_targets({"strategy": node}, given={})) == []
    node["find_unused_parameter"] = node.pop("find_unused_parameters")
    (problem,) = check_targets({"strategy": node}, given={})
    assert "did you mean find_unused_parameters" in format_problem(problem)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    size: Count
    share: NotNegative | None = None

    def __post_init__(self) -> None:
        if self.share is not None and self.share > self.size:
            raise UserError(f"must not exceed size={self.size}", key="share", value=self.share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    inner: Inner
    names: tuple[str, ...] = ()
    copies: Annotated[Mapping[str, Any] | None, KeysOf(Inner)] = None
    timeout: Positive = 1.0


def test_settings_are_checked_and_made() -> None:
    cfg = {"inner": {"size": 3, "share": 1}, "names": ["a"], "timeout": 2}
    assert check_settings(Settings, cfg) == []
    assert make_settings(Settings, cfg) == Settings(inner=Inner(size=3, share=1), names=("a",), timeout=2)


def test_every_mistake_in_settings_is_named_by_its_path() -> None:
    cfg = {"inner": {"size": 0, "shar": 1}, "names": "a", "copies": {"share": -1}, "timeout": float("nan"), "x": 1}
    assert {problem.key for problem in check_settings(Settings, cfg)} == {
        "inner.size", "inner.shar", "names", "copies.share", "copies.size", "timeout", "x",
    }  # fmt: skip


def test_relations_of_settings_count_once_single_values_are_fine() -> None:
    assert check_settings(Settings, {"inner": {"size": 3, "share": 5}}) == [
        Problem("inner.share", 5, "must not exceed size=3")
    ]
    assert len(check_settings(Settings, {"inner": {"size": 3, "share": 5}, "timeout": 0})) == 1
    assert check_settings(Settings, {"inner": {"size": UNSET}}) == []


def test_fields_of_a_parent_in_another_module_keep_their_bounds() -> None:
    own, parent = read_parameters(StatsSettings), read_parameters(SurveySettings)
    assert {name: own[name].annotation for name in parent} == {name: item.annotation for name, item in parent.items()}
    assert Any not in [item.annotation for item in parent.values()]
