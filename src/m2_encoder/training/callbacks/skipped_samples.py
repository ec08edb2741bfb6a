"""Counts of samples that could not be used."""

from __future__ import annotations

from collections import Counter
from typing import Any, Protocol, cast

import lightning
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from m2_encoder.bounds import Count, check_bounds
from m2_encoder.training.callbacks.rows import count_rows

_SKIPPED = "skipped_samples"


class FaultCounts(Protocol):
    """Unusable samples of one rank, by reason."""

    counts: Counter[str]  # read in training
    at_start: Counter[str]  # found when the shards were listed


class FaultCounting(Protocol):
    """A data module that counts unusable samples."""

    fault_log: FaultCounts


class SkippedSamples(Callback):
    """Logs `data/skipped/<reason>`, counted over all ranks and over resumed parts of the run, too.

    A reason appears with its first sample. Ranks exchange their counts every so many steps, and for every checkpoint.

    Attributes:
        totals: read in the whole run, by reason, as of the last exchange.
        at_start: found when the shards were listed, by reason.
    """

    @check_bounds
    def __init__(self, *, every_n_steps: Count = 50) -> None:
        self._every_n_steps = every_n_steps
        self._before: Counter[str] = Counter()
        self.totals: Counter[str] = Counter()
        self.at_start: Counter[str] = Counter()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Exchange and log the counts every so many steps, and after the last one."""
        if trainer.global_step % self._every_n_steps == 0 or trainer.global_step == trainer.max_steps:
            self._exchange(trainer)
            counts = {f"data/skipped/{name}": float(n) for name, n in sorted((self.totals + self.at_start).items())}
            if counts:
                # `pl_module.log` would drop steps that are no multiple of log_every_n_steps.
                counts["samples_seen"] = float(trainer.global_step * count_rows(batch) * trainer.world_size)
                for sink in trainer.loggers:
                    sink.log_metrics(counts, step=trainer.global_step)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the counts of the whole run."""
        self._exchange(trainer)
        checkpoint[_SKIPPED] = dict(self.totals)

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the counts."""
        self._before = Counter(checkpoint.get(_SKIPPED, {}))

    def _exchange(self, trainer: lightning.Trainer) -> None:
        log = getattr(trainer, "datamodule", None)
        own: tuple[Counter[str], Counter[str]] = Counter(), Counter()
        if hasattr(log, "fault_log"):
            faults = cast(FaultCounting, log).fault_log
            own = faults.counts, faults.at_start
        ranks: list[Any] = [own]
        if trainer.world_size > 1:
            ranks = [None] * trainer.world_size
            dist.all_gather_object(ranks, own)
        self.totals = sum((counts for counts, _ in ranks), start=self._before)
        self.at_start = sum((counts for _, counts in ranks), start=Counter[str]())
