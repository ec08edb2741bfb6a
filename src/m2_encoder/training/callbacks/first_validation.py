"""Validation before the first step."""

from __future__ import annotations

import math
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback


class FirstValidation(Callback):
    """Logs the validation of `trainer.num_sanity_val_steps=-1`, before the first step, as that of step 0.

    Lightning runs it and throws its metrics away. They are logged once the first step is done: a start that fails
    before leaves no trace. A run that goes on does not validate again at its start.
    """

    def __init__(self) -> None:
        self._metrics: dict[str, float] = {}

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Keep the metrics of the whole set; fewer batches only look whether validation works."""
        if trainer.sanity_checking and math.isinf(trainer.num_sanity_val_steps):
            found = trainer.callback_metrics.items()
            self._metrics = {name: float(value) for name, value in found if name.startswith("val/")}

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log them, ahead of the first step's own."""
        if self._metrics:
            for sink in trainer.loggers:
                sink.log_metrics({**self._metrics, "samples_seen": 0.0}, step=0)
            self._metrics = {}
