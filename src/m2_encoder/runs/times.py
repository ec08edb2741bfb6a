"""What the time of a training process went to, for `summary.json`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import lightning
from lightning.pytorch.callbacks import Callback


class FitTimes(Callback):
    """Notes when training began and ended, and how long validations took in between.

    Attributes:
        from_step: the step that this process went on from.
        seconds: by part: `start_s` from the start of the work to the first batch, `training_s` without validations,
            `validation_s`, `evaluation_s` at the end. A part that did not take place is missing.
    """

    def __init__(self, started: float) -> None:
        """A clock that has run since `started`, in seconds since the epoch."""
        self.started = started
        self.from_step = 0
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter() - (time.time() - started)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The start is over."""
        self.from_step = trainer.global_step
        self._add("start_s")

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Training pauses."""
        if not trainer.sanity_checking:
            self._add("training_s")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Training goes on."""
        if not trainer.sanity_checking:
            self._add("validation_s")

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Training is over."""
        self._add("training_s")

    @contextmanager
    def measuring(self, part: str) -> Iterator[None]:
        """Counts the time inside as that of a part."""
        self._since = time.perf_counter()
        yield
        self._add(part)

    def to_plain(self) -> dict[str, float]:
        """For JSON: the step, and seconds by part."""
        return {"from_step": self.from_step, **{part: round(spent, 3) for part, spent in self.seconds.items()}}

    def _add(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now
