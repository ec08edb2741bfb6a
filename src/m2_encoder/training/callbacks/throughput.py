"""Throughput of training, and time spent waiting for data."""

from __future__ import annotations

import logging
import time
from typing import Any, Protocol, runtime_checkable

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from m2_encoder.bounds import Count, Fraction, Seconds, check_bounds
from m2_encoder.training.callbacks.rows import count_rows

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 3600.0
_ADVICE = {
    "reading": "move the shards to faster storage, or make data.num_workers larger",
    "decoding": "make data.num_workers larger, or store smaller images (m2-data pack max_side=...)",
    "transforming": "make data.num_workers larger, or switch augmentations of data.transform off",
}


@runtime_checkable
class StagedLoader(Protocol):
    """A data loader that measures its stages."""

    def take_stage_seconds(self) -> dict[str, float]:
        """Seconds that all workers of this rank spent in each stage since the last call."""
        ...


class Throughput(Callback):
    """Logs `samples_seen`, `perf/samples_per_s`, `perf/data_wait` and `perf/load_ms/<stage>`.

    `samples_seen` counts the whole run, resumed parts included. The rate is over all ranks, without the time of
    validation and checkpoints. `perf/data_wait` is the share of that time in which the loop waited for a batch, 0..1;
    `perf/load_ms/<stage>` is the time of a sample of rank 0 in a stage of loading, if the loader measures it. Above
    `warn_share`, a warning names the slowest stage.

    Args:
        window_steps: steps over which a logged rate is averaged.
        warn_share: share of training time spent waiting for data that causes a warning, 0..1.
        warn_after_s: training time over which that share is measured. It doubles after every warning, up to an hour.

    Attributes:
        samples: samples trained on since this process started, over all ranks.
        seconds: time spent on them.
    """

    @check_bounds
    def __init__(self, *, window_steps: Count = 10, warn_share: Fraction = 0.2, warn_after_s: Seconds = 60.0) -> None:
        self._window_steps = window_steps
        self._warn_share = warn_share
        self._watch_s = warn_after_s
        self._watched_seconds = 0.0
        self._watched_wait = 0.0
        self._watched_stages: dict[str, float] = {}
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
        """Add the time since the last step to the waiting time."""
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
        """Count the step, except the first with its warm-up costs; log at the end of every window."""
        now = time.perf_counter()
        batch_size = count_rows(batch) * trainer.world_size
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
            self._log_stages(trainer, pl_module)
            self._watch(trainer)
            self._window_samples, self._window_seconds, self._window_waited = 0, 0.0, 0.0

    def _log_stages(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log the time of a sample in each stage of loading."""
        loader = trainer.train_dataloader
        if not isinstance(loader, StagedLoader):
            return
        samples_of_rank = self._window_samples / trainer.world_size
        for stage, seconds in loader.take_stage_seconds().items():
            pl_module.log(f"perf/load_ms/{stage}", 1e3 * seconds / samples_of_rank)
            self._watched_stages[stage] = self._watched_stages.get(stage, 0.0) + seconds

    def _watch(self, trainer: lightning.Trainer) -> None:
        """Warn if loading was the bottleneck for long enough."""
        self._watched_seconds += self._window_seconds
        self._watched_wait += self._window_waited
        if self._watched_seconds < self._watch_s:
            return
        share = self._watched_wait / self._watched_seconds
        if share > self._warn_share:
            if trainer.is_global_zero:
                logger.warning(
                    "loading is the bottleneck: training waited for data in %.0f %% of the last %.0f s. %s",
                    100 * share,
                    self._watched_seconds,
                    _explain(self._watched_stages),
                )
            self._watch_s = min(2 * self._watch_s, max(self._watch_s, _LONGEST_PAUSE_S))
        self._watched_seconds, self._watched_wait, self._watched_stages = 0.0, 0.0, {}

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave the time of saving out."""
        self._batch_ended = None

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Leave the time of validation out."""
        self._batch_ended = None

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Leave the time after training out."""
        self._batch_ended = None


def _explain(stage_seconds: dict[str, float]) -> str:
    """Which stage of loading is the slowest, and what helps."""
    total = sum(stage_seconds.values())
    if not total:
        return "Make data.num_workers larger"
    shares = ", ".join(f"{stage} {100 * seconds / total:.0f} %" for stage, seconds in stage_seconds.items())
    slowest = max(stage_seconds, key=lambda stage: stage_seconds[stage])
    return f"The slowest stage is {slowest} ({shares}): {_ADVICE.get(slowest, 'make data.num_workers larger')}"
