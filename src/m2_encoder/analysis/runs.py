"""Several runs side by side: what differs between them, and their metrics with spread over seeds."""

from __future__ import annotations

import glob
import os
import re
import statistics
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from m2_encoder.analysis.recorded import RecordedRun, read_run
from m2_encoder.analysis.table import Table
from m2_encoder.config.model_choice import find_path
from m2_encoder.config.paths import anchor
from m2_encoder.config.sweep_jobs import read_outcomes
from m2_encoder.errors import UserError
from m2_encoder.runs.folder import CONFIG_FILE

_PLACE = ("run.name", "run.folder", "run.resume")
_SEED = "seed"


class Runs(Sequence[RecordedRun]):
    """Runs in the order of their names."""

    def __init__(self, runs: Sequence[RecordedRun]) -> None:
        """Of runs that were read one by one."""
        self._runs = tuple(runs)

    def __len__(self) -> int:
        return len(self._runs)

    @overload
    def __getitem__(self, place: int) -> RecordedRun: ...
    @overload
    def __getitem__(self, place: slice) -> Runs: ...
    def __getitem__(self, place: int | slice) -> RecordedRun | Runs:
        return Runs(self._runs[place]) if isinstance(place, slice) else self._runs[place]

    def __iter__(self) -> Iterator[RecordedRun]:
        return iter(self._runs)

    def __repr__(self) -> str:
        return f"Runs({len(self)}: {', '.join(run.name for run in self[:3])}{', …' if len(self) > 3 else ''})"

    @property
    def finished(self) -> Runs:
        """Those that did all their steps and were evaluated; others are at work, or were interrupted."""
        return Runs([run for run in self if run.is_finished])

    @cached_property
    def varies(self) -> list[str]:
        """The settings that are not the same in all runs, but for where a run lies."""
        keys = dict.fromkeys(key for run in self for key in run.settings if key not in _PLACE)
        return [key for key in keys if len({repr(run.settings.get(key)) for run in self}) > 1]

    @cached_property
    def factors(self) -> list[str]:
        """What varies but the seed, one setting of those that always change together."""
        seen: dict[tuple[int, ...], str] = {}
        for key in self.varies:
            values = [repr(run.settings.get(key)) for run in self]
            seen.setdefault(tuple(values.index(value) for value in values), key)
        return [key for key in seen.values() if key != _SEED]

    @cached_property
    def validation_recalls(self) -> list[str]:
        """The mean recalls of sets that are measured during training, too; all where there are none."""
        return [name for name in self.recalls if any(name in line for run in self for line in run.log)] or self.recalls

    @cached_property
    def recalls(self) -> list[str]:
        """The mean recalls of the evaluations at the end, or of validation where nothing was evaluated."""
        ended = (name for run in self for name in run.summary.get("metrics", {}))
        logged = (name for run in self for line in run.log for name in line)
        found = (list(dict.fromkeys(filter(_is_recall, names))) for names in (ended, logged))
        return next(filter(None, found), [])

    def settings(self) -> Table:
        """A row per run: its name, and what varies."""
        return Table(["run", *self.varies], [{"run": run.name, **run.settings} for run in self])

    def table(self, *metrics: str, over: str | None = _SEED) -> Table:
        """Final metrics by what varies: mean and standard deviation over the runs that differ in `over` alone.

        Columns are the settings that vary, `runs` (how many), and per metric its name and `<name> ±` (the sample
        standard deviation; None for one run). A run without the metric counts in neither.

        Args:
            metrics: names, such as `val/emoji_val_zh/mean_recall`; by default all mean recalls of the last evaluation.
            over: the setting to average over; None for a row per run.

        Raises:
            UserError: if no run has such a metric.
        """
        names = metrics or self.recalls
        missing = [name for name in names if all(name not in run.metrics for run in self)]
        if missing or not names:
            self[0].final(missing[0] if missing else "mean_recall")  # says what there is
        keys = [key for key in self.factors if key != over]
        keys += [_SEED] if over != _SEED and _SEED in self.varies else []
        groups: dict[tuple[str, ...], list[RecordedRun]] = {}
        for run in self:
            own = () if over is not None else (run.name,)
            groups.setdefault((*own, *(repr(run.settings.get(key)) for key in keys)), []).append(run)
        rows = [self._row(group, keys, names, over) for group in groups.values()]
        first = [] if over is not None else ["run"]
        shown = [each for name in names for each in (name, f"{name} ±")] if over is not None else list(names)
        return Table([*first, *keys, *(["runs"] if over is not None else []), *shown], rows)

    def _row(self, group: Sequence[RecordedRun], keys: Sequence[str], names: Sequence[str], over: str | None) -> Any:
        row: dict[str, Any] = {"run": group[0].name, "runs": len(group)}
        row |= {key: group[0].settings.get(key) for key in keys}
        for name in names:
            values = [run.final(name) for run in group if name in run.metrics]
            row[name] = statistics.fmean(values) if values else None
            row[f"{name} ±"] = statistics.stdev(values) if len(values) > 1 else None
        return row


def read_runs(pattern: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Runs:
    """Reads runs by a pattern such as `outputs/lr-*`, a folder of runs, that of a sweep, or a list of folders.

    Matches that are no run's folder are passed over. A relative path counts from the working directory, or from the
    checkout's root if nothing is there.

    Raises:
        UserError: if there is no run, or a file of one is damaged.
    """
    if not isinstance(pattern, str | os.PathLike):
        return Runs([read_run(folder) for folder in pattern])
    given = find_path(os.fspath(pattern))
    if given.is_dir():
        places = [given] if (given / CONFIG_FILE).is_file() else _inside(given)
    else:
        places = _match(os.path.expanduser(os.fspath(pattern)))
    runs = [read_run(path) for path in places if (path / CONFIG_FILE).is_file()]
    if not runs:
        what = "no run there" if given.exists() or given.parent.exists() else "no such folder"
        fix = "give a pattern of folders that m2-train wrote, such as 'outputs/lr-*', or the folder of a sweep"
        raise UserError(f"{os.fspath(pattern)}: {what}; {fix}")
    return Runs(sorted(runs, key=lambda run: _in_order(run.name)))


def _inside(folder: Path) -> list[Path]:
    """Runs in a folder, and those that a sweep has written down there."""
    noted = [Path(each.folder) for each in read_outcomes(folder, None, since=0) if each.folder]
    moved = [folder.parent.parent / path.name for path in noted]  # outputs/multirun/NAME, copied with its runs
    return [*folder.iterdir(), *(path if path.is_dir() else other for path, other in zip(noted, moved, strict=True))]


def _match(pattern: str) -> list[Path]:
    """What a pattern stands for here, or else in the checkout's root."""
    found = glob.glob(pattern, recursive=True) or glob.glob(str(anchor(pattern)), recursive=True)
    return [Path(path) for path in found]


def _in_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names as numbers: lr=2 comes before lr=10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _is_recall(name: str) -> bool:
    return name.endswith("/mean_recall")
