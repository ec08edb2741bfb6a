"""How far a run got, and why it ended where it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import lightning
from lightning.pytorch.callbacks import EarlyStopping, Timer


class RunEnd(NamedTuple):
    """Where a run ended."""

    step: int  # optimizer steps that it has done
    planned: int  # `trainer.max_steps`
    reason: str = ""  # why it ended before that, if that is known
    stopped: bool = False  # whether it was to end there, because nothing was left to gain
    taken: int | None = None  # the step whose weights are evaluated and exported, if that is not the last one
    averaged: bool = False  # whether the weights are a moving average

    @property
    def is_finished(self) -> bool:
        """Whether all planned steps are done, of more than a try, or no more are wanted."""
        return (self.step >= self.planned and not self.reason) or self.stopped

    @property
    def taken_step(self) -> int:
        """The step whose weights are evaluated and exported."""
        return self.step if self.taken is None else self.taken

    def __str__(self) -> str:
        best = "" if self.taken is None else f"; the weights are those of step {self.taken:,}, the best"
        best += "; the weights are a moving average" if self.averaged else ""
        if self.step >= self.planned:
            return f"{self.step:,}{f' ({self.reason})' if self.reason else ''}{best}"
        how = "finished" if self.stopped else "ended"
        return f"{self.step:,} of {self.planned:,}, {how} early{f' ({self.reason})' if self.reason else ''}{best}"


class Results(NamedTuple):
    """What a finished run has; empty on all ranks but the first."""

    metrics: Mapping[str, float]  # final ones, by name for loggers
    pictures: Sequence[Path]  # files that the evaluation drew
    folder: Path  # the run's
    step: int  # optimizer steps that it has done


def describe_end(trainer: lightning.Trainer, planned: int, *, debug: bool = False) -> RunEnd:
    """How the training that just ended did so; SIGTERM and errors do not come here. A try never counts as finished."""
    if debug:
        return RunEnd(trainer.global_step, planned, "a debug run")
    if trainer.global_step >= planned:
        return RunEnd(trainer.global_step, planned)
    stoppers = [each for each in trainer.callbacks if isinstance(each, EarlyStopping)]  # type: ignore[attr-defined]
    stopped = next((each.stopping_reason_message for each in stoppers if each.stopping_reason_message), None)
    if stopped is not None and trainer.should_stop:
        return RunEnd(trainer.global_step, planned, stopped, stopped=True)
    timers = [each for each in trainer.callbacks if isinstance(each, Timer)]  # type: ignore[attr-defined]
    if any((remaining := timer.time_remaining()) is not None and remaining <= 0 for timer in timers):
        reason = "trainer.max_time"
    elif trainer.should_stop:
        reason = "a callback stopped it"
    elif trainer.max_epochs not in (None, -1):
        reason = f"trainer.max_epochs={trainer.max_epochs}"
    else:
        reason = "the data ended"
    return RunEnd(trainer.global_step, planned, reason)
