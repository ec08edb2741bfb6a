"""The validation of the step from which a run goes on, if the process was killed before it was over."""

from __future__ import annotations

import lightning
from lightning.pytorch.callbacks import Callback

from m2_encoder.runs.lightning_loggers import JsonlLogger


class MissedValidation(Callback):
    """Runs it before the first step: a checkpoint is saved first, and Lightning goes on with the next step."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Validate, if that was due and `metrics.jsonl` does not have it."""
        step = trainer.global_step
        if step == 0 or not trainer.enable_validation or trainer.check_val_every_n_epoch is not None:
            return
        interval = trainer.val_check_batch
        sinks = [sink for sink in trainer.loggers if isinstance(sink, JsonlLogger)]
        is_due = interval is not None and step % interval == 0
        missed = is_due and not any(sink.has_validation(step) for sink in sinks)
        if not trainer.strategy.broadcast(missed):
            return
        # As Lightning does it after a step.
        loop, connector = trainer.fit_loop.epoch_loop.val_loop, trainer._logger_connector
        first_iteration = connector._first_loop_iter
        trainer.validating = True
        loop.restarting = False
        loop.run()
        trainer.training = True
        connector._first_loop_iter = first_iteration
