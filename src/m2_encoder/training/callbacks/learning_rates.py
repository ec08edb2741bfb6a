"""Learning rates in the logs."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from m2_encoder.training.optim import learning_rates, main_learning_rate


class LearningRate(Callback):
    """Logs `train/lr`: what the schedule has made of `optimizer.lr` for the step that a line is about.

    It stands in the lines of validations, too.
    """

    def __init__(self) -> None:
        self._rates: dict[str, float] = {}

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Log the rates with which the step will be taken."""
        self._rates = self.find(trainer)
        for name, rate in self._rates.items():
            pl_module.log(name, torch.tensor(rate, dtype=torch.float64))

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log them beside the results of a validation, whose step may not be one that is logged."""
        if self._rates and not trainer.sanity_checking:
            for sink in trainer.loggers:
                sink.log_metrics(self._rates, step=trainer.global_step)

    def find(self, trainer: lightning.Trainer) -> dict[str, float]:
        """Rates by name."""
        return {"train/lr": main_learning_rate(trainer.optimizers[0])}


class LearningRateMonitor(LearningRate):
    """Logs the learning rate of every group of parameters: `lr/matrices`, `lr/decayed`, `lr/plain`, `lr/scales`.

    An optimizer of your own names its groups by a key `name`; without it they are `lr/group_0` and so on.
    """

    def find(self, trainer: lightning.Trainer) -> dict[str, float]:
        """Rates by name."""
        return {f"lr/{name}": rate for name, rate in learning_rates(trainer.optimizers[0]).items()}
