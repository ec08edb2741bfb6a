"""Starting `m2-data` in a test's own process."""

from __future__ import annotations

from collections.abc import Callable

Start = Callable[..., int]
"""Runs the command with these arguments in an empty folder; gives its exit code."""
