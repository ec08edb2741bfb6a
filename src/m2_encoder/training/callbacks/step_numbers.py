"""The number of the step beside what somebody else's task logs."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback


class StepNumbers(Callback):
    """Logs `step`, the updates done, as our own tasks do; Lightning's own number is one less, and of batches."""

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log it beside what a step logs."""
        self._log(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log it beside what a validation logs."""
        self._log(trainer, pl_module)

    def _log(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # fp32 counts no further than 16.7 million.
        pl_module.log("step", torch.tensor(float(trainer.global_step), dtype=torch.float64))
