"""How a run's end is told."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import Timer

from m2_encoder.runs.ending import RunEnd, describe_end


@pytest.mark.parametrize(
    ("trainer", "reason"),
    [
        ({"callbacks": [Timer(timedelta(seconds=0))], "should_stop": True}, "trainer.max_time"),
        ({"callbacks": [Timer(timedelta(days=1))], "should_stop": True}, "a callback stopped it"),
        ({"max_epochs": 2}, "trainer.max_epochs=2"),
        ({}, "the data ended"),
    ],
)
def test_a_run_that_ended_early(trainer: dict[str, Any], reason: str) -> None:
    given: Any = SimpleNamespace(
        **{"global_step": 7, "callbacks": [], "should_stop": False, "max_epochs": -1, **trainer}
    )
    end = describe_end(given, 2000)
    assert end == RunEnd(7, 2000, reason)
    assert str(end) == f"7 of 2,000, ended early ({reason})"
    assert not end.is_finished


def test_a_debug_run_never_counts_as_finished() -> None:
    end = describe_end(SimpleNamespace(global_step=20), 20, debug=True)  # type: ignore[arg-type]
    assert (end.is_finished, str(end)) == (False, "20 (a debug run)")


def test_a_run_that_finished() -> None:
    given: Any = SimpleNamespace(global_step=2000, should_stop=True)
    assert describe_end(given, 2000) == RunEnd(2000, 2000)
    assert str(RunEnd(2000, 2000)) == "2,000"
