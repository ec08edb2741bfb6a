"""How many steps a run has, where epochs decide, and what an epoch is: one pass over the training samples.

The order of samples has no end: an epoch is as many whole steps as all sources have samples together, and what is left
over begins the next one. Of sources with weights, a small heavy one is then seen more than once in an epoch.
"""

from __future__ import annotations

from typing import Any

import lightning

from m2_encoder.config.known import Known, run_check
from m2_encoder.config.problems import refuse_all
from m2_encoder.config.relations import check_steps
from m2_encoder.data.epoch import limit_epoch
from m2_encoder.data.webdataset_module import WebDatasetModule
from m2_encoder.errors import UserError


def settle_length(cfg: dict[str, Any], datamodule: lightning.LightningDataModule) -> tuple[dict[str, Any], list[str]]:
    """A configuration whose `trainer.max_steps` says how long the run is, and a line on it where epochs decide.

    The schedule ends with the run, if it was to do so. The data module is told. A `val_check_interval` that is a share
    is one of an epoch.

    Raises:
        UserError: if epochs are asked for and have no length, or no step.
    """
    trainer, lines = dict(cfg["trainer"]), []
    interval, every = trainer.get("val_check_interval", 1.0), trainer.get("check_val_every_n_epoch", 1)
    if isinstance(interval, float) and every is None:
        every = trainer["check_val_every_n_epoch"] = 1
    epochs: Any = trainer.get("max_epochs")
    limits = [key for key in ("limit_train_batches", "overfit_batches") if isinstance(trainer.get(key), float)]
    by_epochs = epochs not in (None, -1)
    if by_epochs or every is not None or any(0 < trainer[key] < 1 for key in limits):
        steps = _count_steps(trainer, datamodule)
        if type(interval) is int and every is not None and trainer.get("limit_val_batches") != 0 and interval > steps:
            rule = f"must not exceed the {steps:,} steps of an epoch, with check_val_every_n_epoch={every}"
            fix = "use trainer.val_check_interval=1.0, or check_val_every_n_epoch=null to count through"
            raise UserError(f"{rule}; {fix}", key="trainer.val_check_interval", value=interval)
        if by_epochs:
            planned, most = epochs * steps, trainer["max_steps"]
            lines.append(f"an epoch has {steps:,} steps" + (f", {epochs:,} have {planned:,}" if epochs > 1 else ""))
            if 0 < most < planned:
                lines[-1] += f"; trainer.max_steps={most} ends the run before that"
            trainer["max_steps"] = planned if most == -1 else min(planned, most)
    settled = {**cfg, "trainer": trainer}
    scheduler = cfg["scheduler"]
    if scheduler.get("max_steps") == cfg["trainer"]["max_steps"]:
        settled["scheduler"] = {**scheduler, "max_steps": trainer["max_steps"]}
    if trainer["max_steps"] != cfg["trainer"]["max_steps"]:
        refuse_all(run_check(check_steps, Known(settled, set())))
    if isinstance(datamodule, WebDatasetModule):
        datamodule.max_steps = max(trainer["max_steps"], int(trainer.get("fast_dev_run") or 0))
    return settled, lines


def _count_steps(trainer: dict[str, Any], datamodule: lightning.LightningDataModule) -> int:
    """Steps of an epoch of this run."""
    if not isinstance(datamodule, WebDatasetModule):
        rule = "count an epoch, whose length this data module does not tell"
        raise UserError(f"{rule}; leave it -1 and give trainer.max_steps", key="trainer.max_epochs", value="...")
    steps = datamodule.count_steps()
    key = "overfit_batches" if trainer.get("overfit_batches") else "limit_train_batches"
    limit = trainer.get(key, 1.0)
    if not (limited := limit_epoch(steps, 1.0 if limit is None else limit)):
        rule = f"leaves nothing of the {steps:,} steps of an epoch; give a number of steps, for example {key}=1"
        raise UserError(rule, key=f"trainer.{key}", value=limit)
    return limited
