"""How fast training runs and how long it waits for data."""

from __future__ import annotations

import time
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback


class Throughput(Callback):
    """Logs `samples_seen`, `perf/samples_per_s` and `perf/data_wait`.

    `samples_seen` counts the whole run, resumed parts included. The rate is over all ranks and over training alone:
    validation and checkpoints do not slow it. `perf/data_wait` is the share of that time in which the loop waited
    for a batch, 0..1.

    Args:
        window_steps: steps over which a published rate is averaged.

    Attributes:
        samples: samples trained on by this process's run so far, over all ranks.
        seconds: time spent on them.
    """

    def __init__(self, *, window_steps: int = 10) -> None:
        self._window_steps = window_steps
        self.samples = 0
        self.seconds = 0.0
        self._window_samples = 0
        self._window_seconds = 0.0
        self._window_waited = 0.0
        self._batch_ended: float | None = None
        self._batch_started = 0.0

    @property
    def samples_per_s(self) -> float:
        """Mean rate of the run, over all ranks; 0 before the first full step."""
        return self.samples / self.seconds if self.seconds else 0.0

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch has arrived: what passed since the last one ended was waiting."""
        self._batch_started = time.perf_counter()
        if self._batch_ended is not None:
            self._window_waited += self._batch_started - self._batch_ended

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count the step; publish at the end of every window. The first step, with its warm-up costs, is left out."""
        now = time.perf_counter()
        batch_size = len(batch.keys) * trainer.world_size
        if self._batch_ended is not None:
            spent = now - self._batch_ended
            self._window_samples += batch_size
            self._window_seconds += spent
            self.samples += batch_size
            self.seconds += spent
        self._batch_ended = now
        # fp64, because fp32 counts no further than 16.7 million.
        pl_module.log("samples_seen", torch.tensor(float(trainer.global_step * batch_size), dtype=torch.float64))
        if trainer.global_step % self._window_steps == 0 and self._window_seconds:
            pl_module.log("perf/samples_per_s", self._window_samples / self._window_seconds)
            pl_module.log("perf/data_wait", self._window_waited / self._window_seconds)
            self._window_samples, self._window_seconds, self._window_waited = 0, 0.0, 0.0

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Forget the clock: saving is not training, nor waiting for data."""
        self._batch_ended = None

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Forget the clock: validation is not training."""
        self._batch_ended = None

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Forget the clock."""
        self._batch_ended = None
