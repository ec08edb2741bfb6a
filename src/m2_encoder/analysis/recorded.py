"""One run, as its folder has recorded it."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from m2_encoder.checkpoints.training_state import CHECKPOINT_FOLDER
from m2_encoder.errors import UserError
from m2_encoder.evaluation.suite import SUMMARY_FILE
from m2_encoder.hub import LoadedModel, load
from m2_encoder.runs.folder import CONFIG_FILE, read_config

METRICS_FILE = "metrics.jsonl"
_AXES = ("step", "samples_seen")


class Curve(NamedTuple):
    """One metric over a run; three lists of one length, ready to be plotted."""

    steps: list[int]  # optimizer steps
    samples: list[int]  # pairs seen by then, of all ranks
    values: list[float]


@dataclass(frozen=True)
class RecordedRun:
    """What a run's folder holds, read once.

    Attributes:
        folder: of the run.
        config: the resolved configuration, nested, as in `config.yaml`.
        log: the lines of `metrics.jsonl`, in order of steps.
        summary: `summary.json`; empty for a run that has not ended.
        swept: what a sweep varied, with the values of this run: keys such as `optimizer.lr`, and groups such as
            `optimizer`; empty for a run on its own.
    """

    folder: Path
    config: Mapping[str, Any]
    log: Sequence[Mapping[str, float]]
    summary: Mapping[str, Any]
    swept: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the folder, which is `run.name`."""
        return self.folder.resolve().name

    @property
    def is_finished(self) -> bool:
        """Whether all planned steps are done and evaluated."""
        return bool(self.summary) and bool(self.summary.get("finished", True))  # early versions did not write it

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration as flat columns, such as `optimizer.lr`, and what a sweep chose; a list is one value."""
        return {**self.swept, **flatten(self.config)}

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Final values by name: those of the evaluation at the end, then what was logged last."""
        last = {name: value for line in self.log for name, value in line.items() if not _is_axis(name)}
        return {**last, **self.summary.get("metrics", {})}

    def curve(self, metric: str) -> Curve:
        """A logged metric, such as `train/loss/total` or `perf/samples_per_s`.

        Raises:
            UserError: if it was never logged.
        """
        lines = [line for line in self.log if metric in line]
        if not lines:
            logged = dict.fromkeys(name for line in self.log for name in line if not _is_axis(name))
            raise UserError(f"{self.name}: logged no {metric!r}{_among(metric, list(logged))}")
        steps, samples = ([int(line.get(axis, 0)) for line in lines] for axis in _AXES)
        return Curve(steps, samples, [line[metric] for line in lines])

    def final(self, metric: str) -> float:
        """The last value of a metric.

        Raises:
            UserError: if there is none.
        """
        if metric not in self.metrics:
            raise UserError(f"{self.name}: has no metric {metric!r}{_among(metric, list(self.metrics))}")
        return float(self.metrics[metric])

    @cached_property
    def checkpoints(self) -> dict[int, Path]:
        """Its checkpoints by step, oldest first."""
        found = (self.folder / CHECKPOINT_FOLDER).glob("step=*.ckpt")
        named = ((re.fullmatch(r"step=(\d+)\.ckpt", path.name), path) for path in found)
        return dict(sorted((int(match[1]), path) for match, path in named if match))

    def load(self, checkpoint: str | int | None = None, **options: Any) -> LoadedModel:
        """Its model, ready to use: that of the export, or of a checkpoint; `options` as in `load`."""
        return load(self.folder, checkpoint=checkpoint, **options)

    def __repr__(self) -> str:
        steps = self.log[-1].get("step", 0) if self.log else 0
        return f"RecordedRun({self.name!r}, {steps:,} steps, {'finished' if self.is_finished else 'not finished'})"


def read_run(folder: str | os.PathLike[str]) -> RecordedRun:
    """Reads the folder of a run, which may still be at work.

    Raises:
        UserError: if it is no run's folder, or a file in it is damaged.
    """
    folder = Path(folder).expanduser()
    if not (folder / CONFIG_FILE).is_file():
        what = "no such folder" if not folder.exists() else f"no run's folder: it has no {CONFIG_FILE}"
        raise UserError(f"{folder}: {what}; m2-train writes one to outputs/<run.name>")
    return RecordedRun(folder, read_config(folder / CONFIG_FILE), _read_log(folder), _read_summary(folder))


def _read_log(folder: Path) -> list[dict[str, float]]:
    path = folder / METRICS_FILE
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    complete = lines[:-1]  # a run at work may have written half of the last one
    return [_read_line(path, number, line) for number, line in enumerate(complete, 1)]


def _read_line(path: Path, number: int, line: str) -> dict[str, float]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: line {number} is damaged; mend it or remove it") from error


def _read_summary(folder: Path) -> dict[str, Any]:
    path = folder / SUMMARY_FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {**content, "metrics": dict(content.get("metrics", {}))}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: is damaged; evaluate again with m2-train ... run.resume=auto") from error


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as flat columns, such as `optimizer.lr`; a list is one value."""

    def walk(values: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, Mapping) and value:
                yield from walk(value, f"{above}{key}.")
            else:
                yield f"{above}{key}", value

    return dict(walk(config, ""))


def _is_axis(name: str) -> bool:
    return name in _AXES


def _among(wanted: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(near)}?" if near else f"; there are {len(known)}, see .metrics"
