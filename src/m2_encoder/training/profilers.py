"""Profilers whose summaries say where the time of a step goes: by its parts, or by operators."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler, PyTorchProfiler, SimpleProfiler

from m2_encoder.bounds import Count, check_bounds

SUMMARY_FILE: Final = "profile"
"""Of the summary in a run's folder; with a suffix for all ranks but the first."""

_STEP: Final = "run_training_batch"
_LOGGING: Final = "[Loggers].log_metrics"
_PARTS: Final[tuple[tuple[str, str], ...]] = (
    ("data", r"\[_TrainingEpochLoop\]\.train_dataloader_next|.*batch_to_device|.*transfer_batch_to_device"),
    ("forward", r"\[Strategy\].*\.training_step"),
    ("backward", r"\[Strategy\].*\.backward"),
    ("callbacks", r"\[(Callback|LightningModule)\].*\.on_train_batch_(start|end)"),
    ("logging", re.escape(_LOGGING)),
)
_ORDER: Final = ("data", "forward", "backward", "optimizer", "callbacks", "logging")
_ASIDE: Final = (
    ("batches of validation", r"\[Strategy\].*\.validation_step"),
    ("checkpoints", "save_checkpoint"),
)


class StepProfiler(SimpleProfiler):
    """Lightning's `SimpleProfiler`, with a table of the parts of a training step above its own.

    The optimizer's part is what a step takes beside forward and backward: clipping, the update, zeroing. The first
    step, which warms up, is left out. `rest` is the loop itself, with what comes between steps.

    Args:
        dirpath: the run's folder.
        filename: of the summary.
    """

    def __init__(self, dirpath: str | Path | None = None, filename: str = SUMMARY_FILE) -> None:
        super().__init__(dirpath=dirpath, filename=filename)
        self._begun: list[float] = []  # when the data of each step were asked for

    def start(self, action_name: str) -> None:
        """Begin to measure an action."""
        super().start(action_name)
        if action_name.endswith("train_dataloader_next"):
            self._begun.append(self.current_actions[action_name])

    def watch(self, loggers: Sequence[Logger]) -> None:
        """Measure what loggers take, too, which Lightning does not."""
        for logger in loggers:
            log: Callable[..., Any] = logger.log_metrics

            @wraps(log)
            def measured(*args: Any, _log: Callable[..., Any] = log, **kwargs: Any) -> Any:
                if _LOGGING in self.current_actions:  # of loggers that hand on to others
                    return _log(*args, **kwargs)
                with self.profile(_LOGGING):
                    return _log(*args, **kwargs)

            logger.log_metrics = measured  # type: ignore[method-assign]

    def parts(self) -> dict[str, float]:
        """Milliseconds of a step by part, and `step`, all of it: medians; empty before the second step has ended."""
        steps = len(self.recorded_durations.get(_STEP, ())) - 1
        if steps < 1:
            return {}
        found = {name: self._measure(pattern, steps) for name, pattern in _PARTS}
        found["optimizer"] = max(0.0, self._measure(_STEP, steps) - found["forward"] - found["backward"])
        parts = {name: 1e3 * found[name] for name in _ORDER}
        between = [later - earlier for earlier, later in pairwise(self._begun[1:])]
        rest = max(0.0, 1e3 * statistics.median(between) - sum(parts.values())) if between else 0.0
        return {**parts, "rest": rest, "step": sum(parts.values()) + rest}

    def _measure(self, pattern: str, steps: int) -> float:
        """Seconds of a step in the actions of a pattern, whose first times are left out."""
        found = [each[1:] for action, each in self.recorded_durations.items() if re.fullmatch(pattern, action)]
        return sum(statistics.median(times) * len(times) / steps for times in found if times)

    def describe_step(self) -> str:
        """The parts of a step as a table of text."""
        parts = self.parts()
        if not parts:
            return "a step was not measured: fewer than two were trained"
        whole = parts["step"]
        lines = [f"{'part of a step':<16}{'ms':>10}{'share':>9}"]
        lines += [f"{name:<16}{value:>10.2f}{value / whole:>9.1%}" for name, value in parts.items()]
        for name, pattern in _ASIDE:
            found = (each for action, each in self.recorded_durations.items() if re.fullmatch(pattern, action))
            times = [value for each in found for value in each]
            if times:
                lines.append(f"beside: {name}, {len(times)} times, {1e3 * statistics.mean(times):.1f} ms each")
        return "\n".join(lines)

    def summary(self) -> str:
        """That table, then every action that Lightning knows."""
        return f"{self.describe_step()}\n\n{super().summary()}\n"

    def _prepare_filename(self, action_name: str | None = None, extension: str = ".txt") -> str:
        return _name_file(self, action_name, extension)


class TraceProfiler(PyTorchProfiler):
    """Lightning's `PyTorchProfiler` for a few steps: a trace for Chrome or Perfetto, and the heaviest operators.

    Args:
        dirpath: the run's folder, where both are written.
        filename: of the summary.
        skip_steps: steps that pass before, with their warm-up costs.
        steps: steps that are traced.
        rows: operators in the summary.
    """

    @check_bounds
    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str = SUMMARY_FILE,
        skip_steps: Count = 3,
        steps: Count = 3,
        rows: Count = 20,
    ) -> None:
        self._rows, self._table = rows, ""
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            schedule=torch.profiler.schedule(wait=skip_steps - 1, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write_trace,
        )

    @property
    def trace(self) -> Path | None:
        """The trace of this rank; None where no folder was given."""
        return None if self.dirpath is None else Path(self.dirpath) / self._prepare_filename(extension=".trace.json")

    def describe_step(self) -> str:
        """The heaviest operators of the steps that were traced, as a table of text."""
        return self._table or "nothing was traced: the run had fewer steps than are skipped, warmed up and traced"

    def summary(self) -> str:
        """That table."""
        return f"{self.describe_step()}\n"

    def _write_trace(self, profiler: torch.profiler.profile) -> None:
        if self._table or self.trace is None:  # validation has steps, too
            return
        self.trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.trace))
        order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        self._table = profiler.key_averages().table(sort_by=order, row_limit=self._rows, max_name_column_width=48)

    def _prepare_filename(self, action_name: str | None = None, extension: str = ".txt") -> str:
        return _name_file(self, action_name, extension)


def _name_file(profiler: Profiler, action_name: str | None, extension: str) -> str:
    rank = f"-rank{profiler._local_rank}" if profiler._local_rank else ""
    return f"{profiler.filename or SUMMARY_FILE}{rank}{f'-{action_name}' if action_name else ''}{extension}"
