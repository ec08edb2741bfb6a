"""Which cases of a test are fast, and what a fixture makes for the tests of its file that run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


def choose_parts(request: pytest.FixtureRequest, every: Mapping[str, T], few: Collection[str]) -> dict[str, T]:
    """All parts where a slow test of the file runs, too; else a few, in the order of all."""
    own = (item for item in request.session.items if item.path == request.path)
    is_slow = any(item.get_closest_marker("slow") for item in own)
    return {name: part for name, part in every.items() if is_slow or name in few}


def mark_parts(names: Collection[str], few: Collection[str]) -> list[object]:
    """Parameters of a test: those of parts that are not among the few are slow."""
    return [name if name in few else pytest.param(name, marks=pytest.mark.slow) for name in names]


def mark_most(cases: Iterable[tuple[Any, ...]], *, every: int = 2) -> list[object]:
    """Parameters of a test with many cases that are alike: the first of every so many is fast, the others are slow.

    The first value names the case: a text, words, or what has a `name`.
    """
    return [
        pytest.param(*case, id=_name(case[0]), marks=() if number % every == 0 else pytest.mark.slow)
        for number, case in enumerate(cases)
    ]


def _name(value: Any) -> str:
    if isinstance(value, str):
        return value
    return " ".join(value) if isinstance(value, list) else str(value.name).replace(" ", "-")
