"""The logger that every run has: `metrics.jsonl`."""

from __future__ import annotations

import json
import math
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from m2_encoder.files import write_text

NOT_METRICS = ("epoch",)  # Lightning adds it; steps decide here, so it is always 0


class JsonlLogger(Logger):
    """Writes `metrics.jsonl`: one object per logged step with `step`, `samples_seen`, then scalars by name.

    Values logged at the same step share a line, which is written at once and again when more values arrive: a process
    that is killed loses nothing. Values that are not finite are left out. A resumed run appends after dropping what a
    crash left behind the checkpoint: lines of later steps, and a half-written last line.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(path)
        self._step: int | None = None
        self._record: dict[str, float | int | None] = {}
        self._line_start = 0

    @property
    def name(self) -> str:
        """Fixed: there is one such file per run."""
        return "metrics"

    @property
    def version(self) -> str:
        """None of its own."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: `config.yaml` stands beside this file."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write scalars of a step, beside those that its line has already."""
        step = 0 if step is None else step
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _naming(self.path), self.path.open("ab") as file:
            if step != self._step:
                self._step, self._record = step, {}
                self._line_start = file.seek(0, os.SEEK_END)
            self._record.update({k: _plain(v) for k, v in metrics.items() if k not in NOT_METRICS})
            head = {"step": step, "samples_seen": self._record.get("samples_seen")}
            line = {key: value for key, value in {**head, **self._record}.items() if value is not None}
            file.truncate(self._line_start)
            file.write(json.dumps(line).encode() + b"\n")

    @rank_zero_only
    def resume_at(self, step: int) -> None:
        """Drop lines of steps after `step`, which a resumed run will write again; that of `step` goes on."""
        if not self.path.is_file():
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if 0 <= _step_of(line) <= step]
        write_text(self.path, "".join(f"{line}\n" for line in kept))
        if kept and _step_of(kept[-1]) == step:
            self._step, self._record = step, json.loads(kept[-1])
            self._line_start = sum(len(line.encode()) + 1 for line in kept[:-1])

    def has_validation(self, step: int) -> bool:
        """Whether the newest line is that of `step` and has metrics of a validation."""
        return self._step == step and any(name.startswith("val/") for name in self._record)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Says which file it was that a disk did not take all of."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """The steps of a `metrics.jsonl`, each once with all that was logged of it, in their order; of a missing file none.

    A line that is damaged is left out.
    """
    rows: dict[int, dict[str, float]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if (step := _step_of(line)) >= 0:
                rows.setdefault(step, {}).update(json.loads(line))
    for step in sorted(rows):
        yield step, {name: value for name, value in rows[step].items() if name != "step"}


def _step_of(line: str) -> int:
    """Step of a written line, -1 for one that a crash cut in half."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return -1


def _plain(value: Any) -> float | int | None:
    """A JSON number: whole floats as integers; what JSON cannot say (nan, inf) as None."""
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() and abs(number) < 2**53 else number
