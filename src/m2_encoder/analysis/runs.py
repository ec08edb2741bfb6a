"""Several runs side by side: what differs between them, and their metrics with spread over seeds."""

from __future__ import annotations

import dataclasses
import glob
import math
import os
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from m2_encoder.analysis.effects import SEED, Difference, Scored, compare_all, compare_levels
from m2_encoder.analysis.recorded import RecordedRun, read_run
from m2_encoder.analysis.table import Table, show_value
from m2_encoder.config.paths import anchor, find_path
from m2_encoder.config.sweep_jobs import read_jobs
from m2_encoder.config.sweeps import swept_values
from m2_encoder.errors import UserError
from m2_encoder.runs.folder import CONFIG_FILE

_COMBINATION = "combination"
_RECALL = "/mean_recall"
_FOLLOWS = ("run", "trainer", "scheduler", "callbacks", "logger")  # what is set by something else, more often than not
_PLACE = ("run.name", "run.folder", "run.resume")


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
        """The settings that are not the same in all runs, but for where a run lies.

        Of the runs of a sweep, what was swept: `optimizer`, and not what an optimizer brings along; and what else
        differs between runs with the same swept values, as after a sweep went on with other settings.
        """
        keys = dict.fromkeys(key for run in self for key in run.settings)
        if all(run.swept for run in self):
            swept = dict.fromkeys(key for run in self for key in run.swept)
            keys = swept | dict.fromkeys(key for key in keys if self._differs_beside(key, swept))
        return [key for key in keys if key not in _PLACE and len({repr(run.settings.get(key)) for run in self}) > 1]

    def _differs_beside(self, key: str, swept: Iterable[str]) -> bool:
        """Whether a setting has several values where the `swept` ones but the seed are the same.

        One that takes the value of the seed, as `objective.itm.seed` does, is the seed.
        """
        if all(run.settings.get(key) in (None, run.settings.get(SEED)) for run in self):
            return False
        found: dict[tuple[str, ...], set[str]] = {}
        for run in self:
            place = tuple(repr(run.settings.get(each)) for each in swept if each != SEED)
            found.setdefault(place, set()).add(repr(run.settings.get(key)))
        return any(len(values) > 1 for values in found.values())

    @cached_property
    def factors(self) -> list[str]:
        """What varies but the seed, one setting of those that always change together."""
        seen: dict[tuple[int, ...], str] = {}
        for key in sorted(self.varies, key=lambda key: key.partition(".")[0] in _FOLLOWS):
            values = [repr(run.settings.get(key)) for run in self]
            seen.setdefault(tuple(values.index(value) for value in values), key)
        return [key for key in self.varies if key in seen.values() and key != SEED]

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
        names = next(filter(None, found), [])
        sets = [name.removesuffix(_RECALL) for name in names]  # of val/emoji_zh and val/emoji_en, val/emoji is the mean
        return [name for name, each in zip(names, sets, strict=True) if not any(s.startswith(f"{each}_") for s in sets)]

    def scored(self, *metrics: str) -> list[Scored]:
        """Settings and score of each run: the mean of its final `metrics`, by default of `validation_recalls`.

        A run that has not all of them, or one that is not finite, is left out.

        Raises:
            UserError: if no run has such a metric.
        """
        chosen = metrics or tuple(self.validation_recalls)
        self._check_metrics(metrics)
        having = [run for run in self if chosen and set(chosen) <= set(run.metrics)]
        scores = [Scored(run.settings, statistics.fmean(map(run.final, chosen))) for run in having]
        return [each for each in scores if math.isfinite(each.score)]

    def _check_metrics(self, names: Iterable[str]) -> None:
        for name in names:
            if self and all(name not in run.metrics for run in self):
                self[0].final(name)  # says what there is

    def differences(self, *metrics: str) -> list[Difference]:
        """What each factor does to the score: its best level against the others, over pairs of equal seed.

        `print` of a difference says it in words, and whether chance may be the reason. What can be told apart comes
        first, then what is larger.

        Args:
            metrics: as in `scored`.
        """
        return compare_all(self.scored(*metrics), self.factors)

    def by_combination(self, *metrics: str) -> dict[str, list[float]]:
        """The scores of each combination of factors, such as `lr=0.1, micro_batches=2`, the best mean first."""
        found: dict[str, list[float]] = {}
        for each in self.scored(*metrics):
            found.setdefault(_name(each.settings, self.factors), []).append(each.score)
        return dict(sorted(found.items(), key=lambda item: -statistics.fmean(item[1])))

    def rivals(self, *metrics: str) -> list[Difference]:
        """The best combination against each other one, as `differences` compares levels."""
        named = [
            Scored({_COMBINATION: _name(each.settings, self.factors), SEED: each.settings.get(SEED)}, each.score)
            for each in self.scored(*metrics)
        ]
        return compare_levels(named, _COMBINATION, [_COMBINATION])

    def settings(self) -> Table:
        """A row per run: its name, and what varies."""
        return Table(["run", *self.varies], [{"run": run.name, **run.settings} for run in self])

    def table(self, *metrics: str, over: str | None = SEED) -> Table:
        """Final metrics by what varies: mean and standard deviation over the runs that differ in `over` alone.

        Columns are the settings that vary, `runs` (how many), and per metric its name and `<name> ±` (the sample
        standard deviation; None for one run). A run without the metric counts in neither.

        Args:
            metrics: names, such as `val/emoji_val_zh/mean_recall`; by default all mean recalls of the last evaluation.
            over: the setting to average over; None for a row per run.

        Raises:
            UserError: if no run has such a metric, or the setting `over`.
        """
        if not self:
            raise UserError("there is no run to compare; m2-train writes one to outputs/<run.name>")
        names = metrics or self.recalls
        self._check_metrics(names or ["mean_recall"])
        if over not in (None, SEED) and all(over not in run.settings for run in self):
            raise UserError(f"over={over!r}: is no setting; what varies is {', '.join(self.varies) or 'nothing'}")
        keys = [key for key in self.factors if key != over]
        keys += [SEED] if over != SEED and SEED in self.varies else []
        groups: dict[tuple[str, ...], list[RecordedRun]] = {}
        for run in self:
            own = () if over is not None else (run.name,)
            groups.setdefault((*own, *(repr(run.settings.get(key)) for key in keys)), []).append(run)
        ordered = sorted(groups.values(), key=lambda group: [self._rank(key, group[0]) for key in keys])
        rows = [self._row(group, keys, names, over) for group in ordered]
        first = [] if over is not None else ["run"]
        shown = [each for name in names for each in (name, f"{name} ±")] if over is not None else list(names)
        return Table([*first, *keys, *(["runs"] if over is not None else []), *shown], rows)

    def _rank(self, key: str, run: RecordedRun) -> float:
        """The place of a run's value among those of a setting: numbers in order, others as they come."""
        values = [each.settings.get(key) for each in (run, *self)]
        numbers = [float(value) for value in values if isinstance(value, int | float)]
        return numbers[0] if len(numbers) == len(values) else list(map(repr, values[1:])).index(repr(values[0]))

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
        places = [given] if (given / CONFIG_FILE).is_file() else list(given.iterdir())
    else:
        places = _match(os.path.expanduser(os.fspath(pattern)))
    runs = [read_run(path) for path in places if (path / CONFIG_FILE).is_file()] + _read_jobs(given)
    if not runs:
        what = "no run there" if given.exists() or given.parent.exists() else "no such folder"
        fix = "give a pattern of folders that m2-train wrote, such as 'outputs/lr-*', or the folder of a sweep"
        raise UserError(f"{os.fspath(pattern)}: {what}; {fix}")
    return Runs(sorted(runs, key=lambda run: _in_order(run.name)))


def _read_jobs(sweep: Path) -> list[RecordedRun]:
    """The runs that a sweep has written down in its folder."""
    found = []
    for job in read_jobs(sweep):
        path = Path(job.folder)
        if job.folder and not path.is_dir():
            path = sweep.parent.parent / path.name  # outputs/multirun/NAME, copied with its runs
        if job.folder and (path / CONFIG_FILE).is_file():
            found.append(dataclasses.replace(read_run(path), swept=swept_values(job.swept)))
    return found


def _match(pattern: str) -> list[Path]:
    """What a pattern stands for here, or else in the checkout's root."""
    found = glob.glob(pattern, recursive=True) or glob.glob(str(anchor(pattern)), recursive=True)
    return [Path(path) for path in found]


def _in_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names as numbers: lr=2 comes before lr=10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _name(settings: Mapping[str, Any], factors: Sequence[str]) -> str:
    """A combination of settings in words: the last part of each key, and its value."""
    return ", ".join(f"{key.rpartition('.')[2]}={show_value(settings.get(key)) or 'null'}" for key in factors)


def _is_recall(name: str) -> bool:
    return name.endswith(_RECALL)
