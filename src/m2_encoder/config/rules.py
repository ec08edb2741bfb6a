"""Rules that single values of a configuration keep, as a table, and the messages when they do not.

A message is one line, `key=value: rule; fix`. Rules look at one value each; what relates several values, or
asks the machine, is in `relations.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from m2_encoder.config.problems import UNSET, nearest, show

SAFE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,99}")
RESERVED_NAMES: Final = ("data", "multirun")


class Problem(NamedTuple):
    """One thing to mend.

    Attributes:
        key: where it is, so that later checks leave it alone.
        text: the whole line for the user.
    """

    key: str
    text: str


class Rule(NamedTuple):
    """What a value must be.

    Attributes:
        key: dotted; `*` stands for any one name.
        holds: whether a value is fine.
        must: the rule in words, after "must be".
        example: a value that is fine.
        hint: takes the value and gives an addition to the fix.
    """

    key: str
    holds: Callable[[Any], bool]
    must: str
    example: str
    hint: Callable[[Any], str] = lambda _: ""

    def problem(self, key: str, value: Any) -> Problem:
        """The message for a value that breaks the rule."""
        fix = f"for example {key}={self.example}"
        return Problem(key, f"{key}={show(value)}: must be {self.must}{self.hint(value)}; {fix}")


def is_whole(value: Any) -> bool:
    """An int; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """A finite int or float; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def whole(
    key: str, least: int, example: str, *, most: int | None = None, optional: bool = False, note: str = ""
) -> Rule:
    """A whole number within bounds."""

    def holds(value: Any) -> bool:
        if value is None:
            return optional
        return is_whole(value) and value >= least and (most is None or value <= most)

    bounds = f"{least} or more" if most is None else f"in {least}..{most}"
    return Rule(key, holds, f"a whole number, {bounds}{_or_null(optional)}{note}", example)


def number(
    key: str,
    example: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    optional: bool = False,
) -> Rule:
    """A finite number within bounds."""
    tests: list[tuple[float | None, Callable[[float, float], bool], str]] = [
        (least, lambda value, bound: value >= bound, "{} or more"),
        (above, lambda value, bound: value > bound, "above {}"),
        (most, lambda value, bound: value <= bound, "at most {}"),
        (below, lambda value, bound: value < bound, "below {}"),
    ]

    def holds(value: Any) -> bool:
        if value is None:
            return optional
        return is_number(value) and all(test(value, bound) for bound, test, _ in tests if bound is not None)

    bounds = " and ".join(text.format(f"{bound:g}") for bound, _, text in tests if bound is not None)
    return Rule(key, holds, f"a number, {bounds}{_or_null(optional)}", example)


def choice(key: str, options: Collection[str], *, example: str | None = None) -> Rule:
    """One of several words."""

    def hint(value: Any) -> str:
        return nearest(value, options) if isinstance(value, str) else ""

    text = f"one of {', '.join(options)}"
    return Rule(
        key, lambda value: isinstance(value, str) and value in options, text, example or next(iter(options)), hint
    )


def flag(key: str) -> Rule:
    """True or false."""
    return Rule(key, lambda value: isinstance(value, bool), "true or false", "true")


def text(key: str, example: str, *, optional: bool = False) -> Rule:
    """A string with something in it."""

    def holds(value: Any) -> bool:
        return optional if value is None else isinstance(value, str) and bool(value.strip())

    return Rule(key, holds, f"a text{_or_null(optional)}", example)


def select(cfg: Mapping[str, Any], pattern: str) -> Iterator[tuple[str, Any]]:
    """All keys that fit a dotted pattern, with their values; missing ones give nothing."""
    yield from _select(cfg, pattern.split("."), "")


def check_rules(cfg: Mapping[str, Any], rules: Sequence[Rule]) -> list[Problem]:
    """Applies a table; a value that is `UNSET` has been reported already."""
    return [
        rule.problem(key, value)
        for rule in rules
        for key, value in select(cfg, rule.key)
        if value is not UNSET and not _contains_unset(value) and not rule.holds(value)
    ]


def _select(node: Any, parts: Sequence[str], path: str) -> Iterator[tuple[str, Any]]:
    if not parts:
        yield path, node
        return
    if not isinstance(node, Mapping):
        return
    for name in node if parts[0] == "*" else [parts[0]]:
        if name in node:
            yield from _select(node[name], parts[1:], f"{path}.{name}".lstrip("."))


def _contains_unset(value: Any) -> bool:
    return isinstance(value, list) and any(item is UNSET for item in value)


def _or_null(optional: bool) -> str:
    return ", or null" if optional else ""
