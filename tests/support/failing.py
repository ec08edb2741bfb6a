"""Callbacks that fail on purpose."""

from __future__ import annotations

from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback


class FailAt(Callback):
    """Raises before a step is done; never for 0."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Fail, if it is time."""
        if self.step and trainer.global_step + 1 == self.step:
            raise RuntimeError(f"this test fails at step {self.step}")


class FailInValidation(Callback):
    """Raises at the start of the validation of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_validation_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Fail, if it is time."""
        if trainer.global_step == self.step:
            raise RuntimeError(f"this test fails in the validation of step {self.step}")
