"""One run, as its folder has recorded it."""

from __future__ import annotations

import difflib
import fnmatch
import json
import os
import re
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from m2_encoder.analysis.sets import read_run_set
from m2_encoder.analysis.table import Table
from m2_encoder.checkpoints.training_state import CHECKPOINT_FOLDER
from m2_encoder.config.paths import find_path
from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.errors import UserError, abridge
from m2_encoder.evaluation.suite import SUMMARY_FILE
from m2_encoder.hub import LoadedModel, load
from m2_encoder.runs.folder import CHECK_FILE, CONFIG_FILE, read_config
from m2_encoder.runs.folder import flatten as flatten

METRICS_FILE = "metrics.jsonl"
_SAMPLES = "samples_seen"
_AXES = ("step", _SAMPLES)


class Curve(NamedTuple):
    """One metric over a run; three lists of one length, ready to be plotted."""

    steps: list[int]  # optimizer steps
    samples: list[int]  # pairs seen by then, of all ranks
    values: list[float]

    def smoothed(self, window: int = 9) -> Curve:
        """Each value as the mean of `window` values around it, of fewer near the ends."""
        half, last = window // 2, len(self.values)
        reach = [min(half, place, last - 1 - place) for place in range(last)]
        means = [statistics.fmean(self.values[at - far : at + far + 1]) for at, far in enumerate(reach)]
        return self._replace(values=means)


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
        ended = bool(self.summary) and bool(self.summary.get("finished", True))  # early versions did not write it
        return ended and not self._goes_on

    @property
    def _goes_on(self) -> bool:
        """Whether steps have been logged since the last end, as of a run that was given more."""
        throughput = self.summary.get("throughput", {})
        return self.steps > int(self.summary.get("steps", throughput.get("step", self.steps)))

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        return int(self.log[-1].get("step", 0)) if self.log else 0

    @property
    def samples_seen(self) -> int:
        """Pairs seen by the last step that was logged, of all ranks."""
        return self._samples_at(self.steps)

    @cached_property
    def facts(self) -> Table:
        """What this run is, in a few lines for people."""
        found, said = self.settings, self.summary
        state = "finished" if self.is_finished else str(said.get("ended_by") or "at work, or interrupted")
        threads = said.get("machine", {}).get("threads")
        lines = {
            "run": self.name,
            "state": state,
            "trained": f"{self.steps:,} steps of {found.get('data.global_batch_size', '?')} pairs, "
            f"{self.samples_seen:,} pairs",
            "model": found.get("model.name"),
            "data": str(self.config.get("data", {}).get("_target_", "")).rpartition(".")[2],
            "objectives": ", ".join(self.config.get("objective") or {}),
            "seed": found.get("seed"),
            "wall time": said.get("wall_time_s") and f"{said['wall_time_s']:,.0f} s",
            "machine": threads and f"{threads} threads, {len(said['machine'].get('gpus', ()))} GPUs",
            "revision": said.get("git_revision") and str(said["git_revision"])[:12],
            "command": said.get("command") and abridge(str(said["command"]), 120),
        }
        return Table(["what", "value"], [{"what": key, "value": value} for key, value in lines.items() if value])

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration as flat columns, such as `optimizer.lr`, and what a sweep chose; a list is one value."""
        return {**self.swept, **flatten(self.config)}

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Final values by name: those of the evaluation at the end, then what was logged last."""
        last = {name: value for line in self.log for name, value in line.items() if not _is_axis(name)}
        ended = self.summary.get("metrics", {})
        return {**ended, **last} if self._goes_on else {**last, **ended}

    def curve(self, metric: str) -> Curve:
        """A logged metric, such as `train/loss/total` or `perf/samples_per_s`.

        Raises:
            UserError: if it was never logged.
        """
        lines = [line for line in self.log if metric in line]
        if not lines:
            logged = dict.fromkeys(name for line in self.log for name in line if not _is_axis(name))
            raise UserError(f"{self.name}: logged no {metric!r}{_among(metric, list(logged))}")
        steps = [int(line.get("step", 0)) for line in lines]
        return Curve(steps, [self._samples_at(step) for step in steps], [line[metric] for line in lines])

    def _samples_at(self, step: int) -> int:
        """Pairs seen after a step; between those that were logged, a batch for every step."""
        known = self._logged_samples
        if step in known:
            return known[step]
        before = max((each for each in known if each < step), default=0)
        return known.get(before, 0) + (step - before) * int(self.settings.get("data.global_batch_size") or 0)

    @cached_property
    def _logged_samples(self) -> dict[int, int]:
        return {int(line["step"]): int(line[_SAMPLES]) for line in self.log if {"step", _SAMPLES} <= line.keys()}

    def curves(self, pattern: str) -> dict[str, Curve]:
        """The logged metrics whose names match, such as `val/*/mean_recall`; empty where none does."""
        names = dict.fromkeys(name for line in self.log for name in line if not _is_axis(name))
        return {name: self.curve(name) for name in fnmatch.filter(names, pattern)}

    def final(self, metric: str) -> float:
        """The last value of a metric.

        Raises:
            UserError: if there is none.
        """
        if metric not in self.metrics:
            raise UserError(f"{self.name}: has no metric {metric!r}{_among(metric, list(self.metrics))}")
        return float(self.metrics[metric])

    @cached_property
    def results(self) -> Table:
        """Recalls of the evaluation at the end, percent: a row per split and language, and one for chance."""
        rows = [
            {"split": split, "language": language, **values}
            for split, by_language in self.summary.get("table", {}).items()
            for language, values in by_language.items()
        ]
        return Table(list(dict.fromkeys(["split", "language", *(name for row in rows for name in row)])), rows)

    @cached_property
    def timing(self) -> dict[str, float]:
        """Seconds by what they went to, in the order in which they come.

        `steps` and `waiting for data` are of all logged steps. `start`, `validation`, `saving, logging`, `evaluation`
        and `export, rest` are of the process that ended the run, which may have gone on from an earlier step. For a run
        of an early version, which did not write them down, `rest` is all of them; a run at work has none of them.
        """
        times, wall = dict(self.summary.get("timing", {})), self.summary.get("wall_time_s")
        trained, waited = _train_seconds(self.log, after=0)
        found = {"waiting for data": waited, "steps": trained - waited}
        if wall is None:
            return found
        if "training_s" not in times:
            return {**found, "rest": max(0.0, wall - trained)}
        own, _ = _train_seconds(self.log, after=int(times["from_step"]))
        if trained == 0:  # too short a run to measure its speed
            found["steps"] = own = float(times["training_s"])
        start, training, validation, evaluation = (
            float(times.get(f"{part}_s", 0.0)) for part in ("start", "training", "validation", "evaluation")
        )
        between = max(0.0, training - own)
        rest = max(0.0, wall - start - training - validation - evaluation)
        after = {"validation": validation, "saving, logging": between, "evaluation": evaluation, "export, rest": rest}
        return {"start": start, **found, **after}

    @cached_property
    def sources(self) -> Table:
        """What was found in its shards before the first step; empty where they were not looked into (`data=emoji`)."""
        check = _read_json(self.folder / CHECK_FILE, "start the run again with run.resume=auto")
        rows = [{"source": name, **flatten(found)} for name, found in check.get("sources", {}).items()]
        return Table(list(dict.fromkeys(["source", *(name for row in rows for name in row)])), rows)

    @cached_property
    def checkpoints(self) -> dict[int, Path]:
        """Its checkpoints by step, oldest first."""
        found = (self.folder / CHECKPOINT_FOLDER).glob("step=*.ckpt")
        named = ((re.fullmatch(r"step=(\d+)\.ckpt", path.name), path) for path in found)
        return dict(sorted((int(match[1]), path) for match, path in named if match))

    def load(self, checkpoint: str | int | None = None, **options: Any) -> LoadedModel:
        """Its model, ready to use: that of the export, or of a checkpoint; `options` as in `load`."""
        with warnings.catch_warnings():  # Lightning's import misses ipywidgets in Jupyter, for bars that nobody draws
            warnings.filterwarnings("ignore", message="IProgress not found")
            return load(self.folder, checkpoint=checkpoint, **options)

    def read_set(self, name: str | None = None, *, image_size: int | None = None) -> RetrievalSet:
        """One of the sets that it is evaluated on, such as `heldout_style` of the built-in data.

        Args:
            name: as tables show it; by default the first one.
            image_size: pixels, for people to look at; by default those of the model.

        Raises:
            UserError: if there is no such set, or it cannot be read.
        """
        return read_run_set(self.config, name, image_size)

    def __repr__(self) -> str:
        return f"RecordedRun({self.name!r}, {self.steps:,} steps, {'finished' if self.is_finished else 'not finished'})"


def read_run(folder: str | os.PathLike[str]) -> RecordedRun:
    """Reads the folder of a run, which may still be at work.

    Args:
        folder: a relative one counts from the working directory, or from the checkout's root if it is not there.

    Raises:
        UserError: if it is no run's folder, or a file in it is damaged.
    """
    folder = find_path(os.fspath(folder))
    if not (folder / CONFIG_FILE).is_file():
        what = "no such folder" if not folder.exists() else f"no run's folder: it has no {CONFIG_FILE}"
        raise UserError(f"{folder}: {what}; m2-train writes one to outputs/<run.name>, `make train` to outputs/emoji")
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
    content = _read_json(folder / SUMMARY_FILE, "evaluate again with m2-train ... run.resume=auto")
    return {**content, "metrics": dict(content.get("metrics", {}))} if content else {}


def _read_json(path: Path, fix: str) -> dict[str, Any]:
    """A JSON object; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: is damaged; {fix}") from error


def _train_seconds(log: Sequence[Mapping[str, float]], *, after: int) -> tuple[float, float]:
    """Seconds that the steps after a step took, and how many of them went to waiting for data."""
    spent = waited = 0.0
    before = max((line.get("samples_seen", 0) for line in log if line.get("step", 0) <= after), default=0)
    for line in log:
        speed = line.get("perf/samples_per_s", 0.0)
        if line.get("step", 0) > after and speed > 0:
            seconds = max(0.0, line.get("samples_seen", 0) - before) / speed
            spent, waited = spent + seconds, waited + seconds * line.get("perf/data_wait", 0.0)
            before = line.get("samples_seen", 0)
    return spent, waited


def _is_axis(name: str) -> bool:
    return name in _AXES


def _among(wanted: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(near)}?" if near else f"; there are {len(known)}, see .metrics"
