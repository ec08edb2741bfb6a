"""A search: trials one after the other, each a job of a sweep, until there are as many as wanted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf
from optuna.trial import FrozenTrial, TrialState

from m2_encoder.config.output import say
from m2_encoder.config.paths import default_run_folder
from m2_encoder.config.problems import flatten, refuse_all
from m2_encoder.config.sweep_jobs import JobOutcome, read_outcomes, write_outcome
from m2_encoder.config.sweep_life import await_run
from m2_encoder.config.sweeps import is_sweep_line, job_name, preset_lines, without_constant
from m2_encoder.files import write_json
from m2_encoder.search.check import read_settings
from m2_encoder.search.space import read_space
from m2_encoder.search.study import PRUNED_AT, PRUNER, Study
from m2_encoder.search.trial import announce_trial

BEST_FILE: Final = "best.json"
_NO_PART: Final = (
    "run.resume",
    "run.export",
    "run.checkpoint_every",
    "hydra",
    "logger",
)  # keys that change no value of a trial


def run_search(arguments: Sequence[str], config: DictConfig, launcher: Launcher) -> None:
    """Runs the trials of a command line that its journal does not have yet.

    Raises:
        UserError: if the journal in the sweep's folder is another search's, or damaged.
    """
    _Search(arguments, config, launcher, Path(config.hydra.sweep.dir)).run()


class _Search:
    """What `run_search` keeps while it runs."""

    def __init__(self, arguments: Sequence[str], config: DictConfig, launcher: Launcher, folder: Path) -> None:
        self._config, self._launcher, self._folder = config, launcher, folder
        self._settings = read_settings(config.hydra)
        self._lines = [*preset_lines(config.hydra, arguments), *arguments]
        self._constant = [line for line in self._lines if not is_sweep_line(line)]
        self._space = read_space(self._lines)
        self._metric = str(OmegaConf.select(config, "run.metric") or "the mean recall of validation")
        self._study = Study(folder, self._settings, self._space)

    def run(self) -> None:
        """Runs what is left."""
        self._check_journal()
        done = [trial for trial in self._study.trials if trial.state.is_finished()]
        told = f", {len(done)} are done already" if done else ""
        what = f"{self._settings.n_trials} trials that {self._settings.direction} {self._metric}"
        say(f"search: {what}{told}; everything in {self._folder}", error=True)
        for trial in done:
            self._list_again(trial)
        while (number := self._next()) is not None:
            self._try(number)
        self._tell_best()

    def _check_journal(self) -> None:
        made_of = {"run.metric": self._metric, "hydra.sweeper.direction": self._settings.direction}
        made_of |= {dimension.key: str(dimension) for dimension in self._space}
        for line in self._lines:
            key, _, value = line.partition("=")
            if not is_sweep_line(line) and not key.lstrip("+").startswith(_NO_PART):
                made_of[key] = value
        refuse_all(list(self._study.describe_changes(made_of)))
        for name in ("sampler", "seed", PRUNER):
            if self._study.keep(name, getattr(self._settings, name)):
                say(f"search: hydra.sweeper.{name} has changed since the last start; it counts from now on", error=True)

    def _next(self) -> int | None:
        """The number of the trial to run now: one that was at work when an earlier start ended, or a new one."""
        trials = self._study.trials
        left = [trial.number for trial in trials if not trial.state.is_finished()]
        if left:
            return left[0]
        more = len(trials) < self._settings.n_trials and not self._study.is_exhausted
        return len(trials) if more else None

    def _try(self, number: int) -> None:
        swept = iter(self._study.ask(number))
        job = [next(swept) if is_sweep_line(line) else line for line in self._lines]
        trial = self._study.trials[number]
        earlier = next((t for t in self._study.trials[:number] if t.params == trial.params), None)
        if earlier is not None:
            say(f"search: trial {number} is trial {earlier.number} again, which is not run twice", error=True)
            self._study.repeat(number, earlier)
            return
        name = self._name(self._config, job)
        value = math.nan
        if PRUNED_AT in trial.user_attrs:  # its process has ended it, and nobody was left to hear so
            (outcome,) = read_outcomes(self._folder, [name], since=0)
            write_outcome(self._folder, outcome._replace(state="pruned", folder=str(self._run_folder(name)), reason=""))
        else:
            await_run(self._run_folder(name))  # that a process of an earlier start has left
            value, name = self._launch(number, job, name)
        self._study.name(number, name)
        if PRUNED_AT in self._study.trials[number].user_attrs:
            self._study.tell(number, TrialState.PRUNED)
        elif math.isfinite(value):
            self._study.tell(number, TrialState.COMPLETE, value)
        else:
            self._study.tell(number, TrialState.FAIL)

    def _launch(self, number: int, job: list[str], name: str) -> tuple[float, str]:
        """Runs the job of a trial; its value, NaN if it has none, and its name."""
        with announce_trial(self._folder, number if self._settings.pruner is not None else None):
            try:
                (returned,) = self._launcher.launch([job], initial_job_idx=number)
                value: Any = returned.return_value
            except Exception as error:  # the values of the trial do not go together
                reason = flatten(error)
                say(f"search: trial {number} cannot be run: {reason}", error=True)
                write_outcome(self._folder, JobOutcome(name, "refused", reason=reason))
                return math.nan, name
        return math.nan if value is None else float(value), self._name(returned.cfg, job)

    def _name(self, config: DictConfig | None, job: Sequence[str]) -> str:
        swept = without_constant(job, self._constant)
        return job_name(str(OmegaConf.select(config or self._config, "run.name")), swept)

    def _run_folder(self, name: str) -> Path:
        return default_run_folder({"run": {"name": name, "folder": self._config.run.folder}})

    def _list_again(self, trial: FrozenTrial) -> None:
        """Lists a trial of an earlier start among the jobs of this one."""
        name = self._study.name_of(trial)
        if name:
            (outcome,) = read_outcomes(self._folder, [name], since=0)
            write_outcome(self._folder, outcome._replace(state="skipped") if outcome.state == "finished" else outcome)

    def _tell_best(self) -> None:
        trials = self._study.trials
        sign = 1 if self._settings.direction == "maximize" else -1
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        if not complete:
            say(f"search: none of {len(trials)} trials has {self._metric}", error=True)
            return
        best = max(complete, key=lambda trial: (sign * (trial.value or 0), -trial.number))
        overrides = [dimension.write(best.params[dimension.key]) for dimension in self._space]
        name = self._study.name_of(best)
        content = {"name": name, "trial": best.number, "value": best.value, "overrides": overrides}
        write_json(self._folder / BEST_FILE, {"metric": self._metric, **content})
        said = f"{self._metric} = {best.value:.6g}: {' '.join(overrides)}"
        say(f"search: the best of {len(trials)} trials is {name}, with {said}", error=True)
