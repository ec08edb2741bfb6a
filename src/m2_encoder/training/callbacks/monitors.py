"""Callbacks that decide by a metric: when to stop, and which checkpoint is the best."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.trainer.states import TrainerFn

from m2_encoder.bounds import Count, NotNegative, Score, Text, check_bounds
from m2_encoder.errors import UserError, name_some

Mode = Literal["max", "min"]
MEAN_RECALL = "mean_recall"
"""The last part of the metric that is watched where none is named: recall at 1, 5 and 10 of both ways and languages."""


class Monitoring(Callback):
    """Watches one metric, whose value on the first rank counts for all.

    Attributes:
        key: of the callback in the configuration, for messages.
        monitor: name of the metric; empty for the mean recall, until `resolve` has named it.
    """

    key = "callbacks"
    monitor: str

    def resolve(self, module: lightning.LightningModule) -> None:
        """Name the metric that is watched by default, which has the name of the validation set in it."""
        if not self.monitor:
            self.monitor = f"val/{getattr(module, 'validation_name', 'val')}/{MEAN_RECALL}"

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Name the metric, before a state is restored by that name."""
        self.resolve(pl_module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look for a metric of training after the first step, long before the first validation asks for it.

        Raises:
            UserError: naming those that there are.
        """
        if self.monitor.startswith("train/") and self.monitor not in trainer.callback_metrics:
            raise unknown_metric(self.key, self.monitor, list(trainer.callback_metrics))

    def read(self, trainer: lightning.Trainer) -> float | None:
        """The value after a validation of training; None in other validations, which decide nothing.

        Raises:
            UserError: if there is no such metric, naming those that there are.
        """
        is_fit = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not is_fit or getattr(trainer, "fast_dev_run", False):
            return None
        if self.monitor not in trainer.callback_metrics:
            raise unknown_metric(self.key, self.monitor, list(trainer.callback_metrics))
        return float(trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor])))


class StopEarly(Monitoring, EarlyStopping):
    """Lightning's `EarlyStopping`, after validations: ends training when a metric has not got better for some of them.

    A run that it ended is a finished one. Started again with the same settings here it stays so; with others, such as
    more patience, or without this callback, it goes on.

    Args:
        monitor: name of the metric; None for the mean recall of validation, over its languages.
        mode: whether more or less of it is better.
        patience: validations in a row without a better value.
        min_delta: what the metric must rise or fall by to count as better.
        check_finite: stop when the metric is not finite.
        stopping_threshold: stop as soon as the metric is better than this.
        divergence_threshold: stop as soon as the metric is worse than this.

    Attributes:
        stopped: why it has ended the training; empty while it has not.
    """

    @check_bounds
    def __init__(
        self,
        *,
        monitor: Text | None = None,
        mode: Mode = "max",
        patience: Count = 3,
        min_delta: NotNegative = 0.0,
        check_finite: bool = True,
        stopping_threshold: Score | None = None,
        divergence_threshold: Score | None = None,
    ) -> None:
        EarlyStopping.__init__(
            self,
            monitor or "",
            mode=mode,
            patience=patience,
            min_delta=min_delta,
            check_finite=check_finite,
            stopping_threshold=stopping_threshold,
            divergence_threshold=divergence_threshold,
            check_on_train_epoch_end=False,
        )
        self._settings = {
            "patience": patience,
            "min_delta": min_delta,
            "check_finite": check_finite,
            "stopping_threshold": stopping_threshold,
            "divergence_threshold": divergence_threshold,
        }
        self._best_step = 0
        self.stopped = ""

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Name the metric."""
        Monitoring.setup(self, trainer, pl_module, stage)
        EarlyStopping.setup(self, trainer, pl_module, stage)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """End the training of a run that has been ended before, before its first step."""
        if self.stopped:
            trainer.should_stop = True

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Count the validation, and stop if it was one too many."""
        value = self.read(trainer)
        if value is None or self.stopped:
            return
        stops, _ = self._evaluate_stopping_criteria(torch.tensor(value, dtype=torch.float64))
        if self.wait_count == 0:
            self._best_step = trainer.global_step
        if stops:
            self.stopped = self._explain(value)
            self.stopping_reason_message = self.stopped
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """What has been seen, in plain values."""
        best = float(self.best_score)
        own = {"wait_count": self.wait_count, "best": best, "best_step": self._best_step, "stopped": self.stopped}
        return {**own, "settings": dict(self._settings)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting; a stop counts where the settings are those that led to it."""
        self.wait_count = int(state_dict["wait_count"])
        self.best_score = torch.tensor(state_dict["best"], dtype=torch.float64)
        self._best_step = int(state_dict["best_step"])
        self.stopped = str(state_dict["stopped"]) if state_dict["settings"] == self._settings else ""
        self.stopping_reason_message = self.stopped or None

    def stopped_in(self, states: Mapping[str, Any]) -> str:
        """Why it ended the training whose callbacks had these states; empty if it did not."""
        state = states.get(self.state_key)
        return str(state["stopped"]) if state is not None and state["settings"] == self._settings else ""

    def _explain(self, value: float) -> str:
        best = f"best {float(self.best_score):.6g} at step {self._best_step}"
        if not math.isfinite(value):
            why = f"{self.monitor} is {value}"
        elif self.wait_count >= self.patience:
            change = "rise" if self.mode == "max" else "fall"
            times = "validation" if self.patience == 1 else f"{self.patience} validations"
            why = f"{self.monitor} did not {change} in the last {times}"
        else:
            why = f"{self.monitor}={value:.6g} passed a threshold"
        return f"early stopping: {why}; {best}" if math.isfinite(self.best_score) else f"early stopping: {why}"


class BestCheckpoint(Monitoring):
    """Chooses the step with the best value of a metric; `RunCheckpoint` keeps its state as `best.ckpt`.

    Args:
        monitor: name of the metric; None for the mean recall of validation, over its languages.
        mode: whether more or less of it is better.

    Attributes:
        value: the best one so far; None before the first validation.
        step: at which it was reached.
    """

    @check_bounds
    def __init__(self, *, monitor: Text | None = None, mode: Mode = "max") -> None:
        self.monitor = monitor or ""
        self.mode: Mode = mode
        self.value: float | None = None
        self.step = 0

    @property
    def state_key(self) -> str:
        """Another metric begins anew."""
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    def is_new(self, trainer: lightning.Trainer) -> bool:
        """Whether the step that was just validated is the best one."""
        return self.value is not None and self.step == trainer.global_step

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Compare."""
        value = self.read(trainer)
        if value is None or not math.isfinite(value):
            return
        if self.value is None or (value > self.value if self.mode == "max" else value < self.value):
            self.value, self.step = value, trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """The best value and its step."""
        return {"value": self.value, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self.value, self.step = state_dict["value"], int(state_dict["step"])


def unknown_metric(key: str, monitor: str, there: Sequence[str]) -> UserError:
    """That a metric does not exist, and which do: the likest ones first, then those of validation."""
    names = sorted((name for name in there if "/" in name), key=lambda name: not name.startswith("val/"))
    like = difflib.get_close_matches(monitor[:200], names)
    names = list(dict.fromkeys((*like, *names)))
    fix = f"the metrics are {name_some(names, 12, 60)}" if names else "it has logged none at all"
    return UserError(f"is no metric of this run; {fix}", key=f"{key}.monitor", value=monitor)
