"""Progress bar of training: step, time, throughput, loss and recall."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import lightning
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from m2_encoder.types import LANGUAGES

_PLAIN_LINES = 20  # lines over a whole run where there is no terminal


class TrainingProgress(ProgressBar):
    """A live bar with its numbers below in a terminal; about twenty plain lines over the run in a log file.

    Shows the step, elapsed and remaining time, samples per second, the loss per language, the learning rate and the
    last validation recalls (text to image, R@10, percent).
    """

    def __init__(self, *, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or Console()
        self._progress: _TwoLines | None = None
        self._task = TaskID(0)
        self._recalls = ""
        self._started = 0.0
        self._first_step = 0
        self._enabled = True

    def disable(self) -> None:
        """Lightning calls this on every rank but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar again."""
        self._enabled = True

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Draw the bar."""
        self._started = time.monotonic()
        self._first_step = trainer.global_step
        if not self._enabled or not self._console.is_terminal:
            return
        self._progress = _TwoLines(
            TextColumn("[bold]training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("·"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            expand=True,
        )
        self._task = self._progress.add_task("", total=trainer.max_steps, completed=trainer.global_step)
        self._progress.start()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Move the bar; without a terminal, write a line now and then."""
        if not self._enabled:
            return
        step = trainer.global_step
        if self._progress is not None:
            self._progress.status = self._status(trainer)
            self._progress.update(self._task, completed=step)
        elif step % max(1, trainer.max_steps // _PLAIN_LINES) == 0 or step == trainer.max_steps:
            elapsed = time.monotonic() - self._started
            left = elapsed / max(1, step - self._first_step) * (trainer.max_steps - step)
            width = len(str(trainer.max_steps))
            self._console.print(
                f"step {step:>{width}}/{trainer.max_steps} · {_clock(elapsed)}, {_clock(left)} left · "
                f"{self._status(trainer)}",
                highlight=False,
                soft_wrap=True,
            )

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Remember the recalls."""
        metrics = trainer.callback_metrics
        shown = []
        for language in reversed(LANGUAGES):
            for name, value in metrics.items():
                if name.startswith("val/") and name.endswith(f"_{language}/t2i_r@10"):
                    shown.append(f"{language} {float(value):.1f}")
        self._recalls = f"val R@10 {' '.join(shown)}" if shown else ""
        if self._progress is not None:
            self._progress.status = self._status(trainer)
        elif self._enabled and self._recalls and trainer.global_step == trainer.max_steps:
            self._console.print(self._recalls, highlight=False, soft_wrap=True)  # no later line would show it

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take the live line down."""
        self._stop()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Leave the terminal usable."""
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _status(self, trainer: lightning.Trainer) -> str:
        metrics = trainer.callback_metrics
        parts = []
        if "perf/samples_per_s" in metrics:
            parts.append(f"{float(metrics['perf/samples_per_s']):,.0f} samples/s")
        if "train/loss/total" in metrics:
            by_language = [
                f"{language} {float(metrics[f'train/loss/itc_{language}']):.2f}"
                for language in reversed(LANGUAGES)
                if math.isfinite(metrics.get(f"train/loss/itc_{language}", math.nan))
            ]
            detail = f" ({' '.join(by_language)})" if by_language else ""
            parts.append(f"loss {float(metrics['train/loss/total']):.3f}{detail}")
        if "train/lr" in metrics:
            parts.append(f"lr {float(metrics['train/lr']):.2e}")
        if self._recalls:
            parts.append(self._recalls)
        return " · ".join(parts)


class _TwoLines(Progress):
    """The bar, and the numbers below it: together they do not fit a terminal of 80 columns."""

    status = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        """What is drawn at every refresh."""
        yield from super().get_renderables()
        yield Text(self.status, no_wrap=True, overflow="ellipsis")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
