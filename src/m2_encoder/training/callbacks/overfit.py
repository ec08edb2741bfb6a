"""Whether a run that sees the same few batches again and again learns them by heart."""

from __future__ import annotations

import math
from typing import Any, Final

import lightning
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from m2_encoder.objectives.contrastive import ImageTextContrastive
from m2_encoder.training.module import PretrainModule
from m2_encoder.types import ImageTextBatch

_NEAR: Final = 0.1  # of the way from where the loss began to the least that it can be


class OverfitVerdict(Callback):
    """Says at the end whether the loss fell near zero: by nine tenths.

    A model, an objective and a learning rate that work learn a few batches by heart; where the loss stays up, one of
    them does not. With k captions for each image, the contrastive loss cannot fall below half of log(k): an image has
    then k right captions, and is compared with all of them at once.

    Attributes:
        first: mean loss of the first epoch; None before it has ended.
        last: mean loss of the last whole epoch; None before it has ended.
        least: what the loss cannot fall below.
    """

    def __init__(self, *, console: Console | None = None) -> None:
        self._console = console or Console()
        self._losses: list[float] = []
        self.first: float | None = None
        self.last: float | None = None
        self.least = 0.0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss of a step."""
        self._losses.append(float(outputs["loss"]))
        if isinstance(pl_module, PretrainModule) and isinstance(batch, ImageTextBatch):
            contrastive = (o for o in pl_module.trained_objectives().values() if isinstance(o, ImageTextContrastive))
            weight = sum(objective.weight_at(trainer.global_step) for objective in contrastive)
            self.least = weight * math.log(max(1, len(batch.text.ids) // len(batch.images))) / 2

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take the mean of an epoch."""
        self.last = sum(self._losses) / max(1, len(self._losses))
        self.first = self.last if self.first is None else self.first
        self._losses = []

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Say what came of it."""
        if trainer.is_global_zero and self.first is not None:
            self._console.print(self.describe(trainer.num_training_batches), highlight=False, soft_wrap=True)

    def describe(self, batches: float) -> str:
        """The verdict in words, on so many batches."""
        first, last, least = self.first or 0.0, self.last or 0.0, self.least
        what = f"overfit: the loss of {batches:g} batch(es) went from {first:.3f} to {last:.3f}"
        if least:
            what += f", of which {least:.3f} is there always, as images have several captions"
        if last - least <= _NEAR * (first - least):
            return f"{what}: it fell near zero, so what is trained can learn them by heart"
        return f"{what}: not near zero; train longer, try another optimizer.lr, or look for a fault in model or loss"
