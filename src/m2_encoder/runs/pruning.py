"""Trials of a search that do badly end early."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from m2_encoder.errors import UserError
from m2_encoder.runs.metric import find_metric
from m2_encoder.search.trial import OwnTrial, find_own_trial


class Pruning(Callback):
    """Reports `run.metric` after every validation; all ranks stop where the search says that it is hopeless.

    A trial that has done all its steps is not ended. What a trial that goes on has reported before stays, and was
    decided on: only what was reported last, before the process was killed, is decided now.

    Attributes:
        is_over: whether the search has ended the trial.
    """

    def __init__(self, trial: OwnTrial, metric: str | None) -> None:
        """Of a trial.

        Args:
            trial: that of this process.
            metric: `run.metric`.
        """
        self.is_over = False
        self._trial, self._metric = trial, metric

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Decide on what was reported last, if that was at the step from which the trial goes on."""
        if 0 < trainer.global_step < trainer.max_steps:
            self._decide(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Report, and decide."""
        if trainer.sanity_checking or trainer.global_step >= trainer.max_steps:
            return
        if trainer.is_global_zero:
            values = {name: float(value) for name, value in trainer.callback_metrics.items()}
            try:
                value = find_metric(self._metric, values, values)
            except UserError:  # it is measured at the end alone, or not finite
                value = None
            if value is not None and math.isfinite(value):
                self._trial.report(trainer.global_step, value)
        self._decide(trainer)

    def _decide(self, trainer: lightning.Trainer) -> None:
        step = trainer.global_step
        ends = trainer.is_global_zero and self._trial.last_step == step and self._trial.is_hopeless()
        if trainer.strategy.broadcast(ends):
            self.is_over = trainer.should_stop = True


def find_pruning(cfg: Mapping[str, Any]) -> list[Pruning]:
    """What ends this process early, if it runs a trial of a search that does so."""
    trial = find_own_trial()
    return [] if trial is None else [Pruning(trial, cfg["run"].get("metric"))]
