"""How far a run got, and why it ended where it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import lightning
from lightning.pytorch.callbacks import Timer


class RunEnd(NamedTuple):
    """Where a run ended."""

    step: int  # optimizer steps that it has done
    planned: int  # `trainer.max_steps`
    reason: str = ""  # why it ended before that, if that is known

    @property
    def is_finished(self) -> bool:
        """Whether all planned steps are done, of more than a try."""
        return self.step >= self.planned and not self.reason

    def __str__(self) -> str:
        if self.is_finished:
            return f"{self.step:,}"
        if self.step >= self.planned:
            return f"{self.step:,} ({self.reason})"
        return f"{self.step:,} of {self.planned:,}, ended early{f' ({self.reason})' if self.reason else ''}"


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
