"""What a fixture makes for the tests of its file that run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

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
