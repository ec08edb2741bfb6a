"""One job of a command: what Hydra calls with a composed configuration, alone or as one of a sweep."""

from __future__ import annotations

import contextlib
import math
import os
import pkgutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from m2_encoder.config.groups import drop_unchosen
from m2_encoder.config.job_process import Ended, run_process
from m2_encoder.config.old_names import update_names
from m2_encoder.config.output import say
from m2_encoder.config.problems import find_problems, format_problem
from m2_encoder.config.run_folder import hold_run
from m2_encoder.config.sweep_jobs import (
    EXIT_PRUNED,
    JOBS_FOLDER,
    JobOutcome,
    describe_crash,
    describe_job,
    read_outcomes,
    settings_digest,
    write_outcome,
)
from m2_encoder.config.sweep_life import environment_of_job, leave_with_sweep
from m2_encoder.config.sweeps import job_name, without_constant
from m2_encoder.distributed.ranks import is_first_rank
from m2_encoder.errors import UserError
from m2_encoder.files import is_full

if TYPE_CHECKING:
    from m2_encoder.config.command import Command

EXIT_USER_ERROR: Final = 2
_OF_LIGHTNING: Final = "MisconfigurationException"
FULL_ERROR: Final = "HYDRA_FULL_ERROR"
GROUP_VARIABLE: Final = "WANDB_RUN_GROUP"
"""W&B's own: the runs of a sweep are one group there, unless the user names another."""


class Job:
    """What Hydra calls with the composed configuration of one job."""

    def __init__(
        self,
        command: Command,
        constant_lines: Sequence[str],
        folder: Path,
        flags: Sequence[str],
        fixed: Sequence[str],
        names: Sequence[str] | None = None,
        refused: Mapping[str, str] | None = None,
    ) -> None:
        """Of a sweep, `names` are those of all jobs; None if they are not known beforehand.

        `refused` holds the reasons of those that are not to be run.
        """
        self._command, self._folder = command, folder
        self._constant, self._fixed, self._names = list(constant_lines), list(fixed), names
        self._refused = dict(refused or {})
        self._flags = [flag for flag in flags if flag != "--multirun"]
        self._started = time.time()
        self.exit_code = 0
        self._shown = os.environ.get(FULL_ERROR)

    @contextlib.contextmanager
    def hydra_raises(self) -> Iterator[None]:
        """What fails until the job is called, such as Hydra's records on a full disk, is ours to report."""
        os.environ[FULL_ERROR] = "1"
        try:
            yield
        finally:
            self._let_hydra_report()

    def _let_hydra_report(self) -> None:
        if self._shown is None:
            os.environ.pop(FULL_ERROR, None)
        else:
            os.environ[FULL_ERROR] = self._shown

    def __call__(self, cfg: DictConfig) -> float | None:
        """Does the work of one configuration, or of one job of a sweep; what is returned is the sweeper's.

        That is the number of the run; NaN for a job that did not finish; None for a command that measures nothing.
        """
        self._let_hydra_report()
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        assert isinstance(values, dict)
        plain = update_names({str(key): value for key, value in values.items()})
        settings = HydraConfig.get()
        drop_unchosen(plain, self._folder, settings.searchpath)
        held: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if settings.mode == RunMode.MULTIRUN:
            job = self._name(plain, settings)
            if runs_here(settings):
                outcome = self._run_of_sweep(plain, job, settings)
                return math.nan if self._command.measure and outcome.value is None else outcome.value
            say(f"{self._command.name}: job {settings.job.num}: {job.name}", error=True)
            if job.name in self._refused:
                say(f"{self._command.name}: {self._refused[job.name]}", error=True)
                raise SystemExit(EXIT_USER_ERROR)
            os.environ.setdefault(GROUP_VARIABLE, Path(settings.sweep.dir).name)
            held = hold_run(plain) if self._command.run_folder is not None else held
        try:
            with held:
                self.exit_code = resolve(self._command.run)(plain) or 0
            measures = self._command.measure and settings.mode == RunMode.MULTIRUN and is_first_rank()
            return resolve(self._command.measure)(plain) if measures else None
        except Exception as error:
            mistake = find_user_error(error, place_of(self._command, plain))
            if mistake is None or os.environ.get(FULL_ERROR) == "1":
                raise
            report_problems(self._command.name, mistake)
            raise SystemExit(EXIT_USER_ERROR) from error

    def _name(self, cfg: dict[str, Any], settings: Any) -> JobOutcome:
        """What a job of a sweep is called, which its configuration then has as the name of its run, and known by."""
        command, settings_known = self._command, settings_digest(cfg)
        swept = without_constant(_task_lines(settings), self._constant)
        name = rename(command, cfg, swept, None if self._names is None else self._names[settings.job.num])
        name = name or job_name(command.name, swept)
        folder = "" if command.run_folder is None else str(command.run_folder(cfg))
        return JobOutcome(name, "at work", folder, swept=swept, settings=settings_known)

    def _run_of_sweep(self, cfg: dict[str, Any], job: JobOutcome, settings: Any) -> JobOutcome:
        """One job: whatever becomes of it, the others are run; only a signal ends them all."""
        leave_with_sweep()
        sweep, command = Path(settings.sweep.dir), self._command
        number = settings.job.num
        if job.name in self._refused:
            outcome = job._replace(state="refused", reason=self._refused[job.name])
        elif command.is_done and resolve(command.is_done)(cfg):
            outcome = self._measure(cfg, job._replace(state="skipped"))
        else:
            write_outcome(sweep, job)
            self._tell(job, number, sweep)
            begun = time.monotonic()
            if command.module:
                log = None if is_alone(settings) else sweep / JOBS_FOLDER / f"{job.name}.log"
                outcome = self._run_process(job, settings, log)
            else:
                outcome = self._run_here(cfg, job)
            leave_with_sweep()  # it has ended the job, too, which is not to be told
            outcome = self._measure(cfg, outcome._replace(seconds=round(time.monotonic() - begun, 1)))
        write_outcome(sweep, outcome)
        self._tell(outcome, number, sweep)
        return outcome

    def _tell(self, outcome: JobOutcome, number: int, sweep: Path) -> None:
        outcomes = None if self._names is None else read_outcomes(sweep, self._names, since=self._started)
        say(f"{self._command.name}: {describe_job(outcome, number, outcomes, since=self._started)}", error=True)

    def _measure(self, cfg: dict[str, Any], outcome: JobOutcome) -> JobOutcome:
        """An outcome with the number of the run."""
        if outcome.state not in ("finished", "skipped") or not self._command.measure:
            return outcome
        try:
            return outcome._replace(value=resolve(self._command.measure)(cfg))
        except UserError as error:
            report_problems(self._command.name, error)
            return outcome._replace(state="refused", reason=format_problem(find_problems(error)[0]))

    def _run_process(self, job: JobOutcome, settings: Any, log: Path | None) -> JobOutcome:
        lines = [line for line in _task_lines(settings) if not line.startswith("run.name=")]
        lines += [hydra_line("run.name", job.name), "hydra.mode=RUN"]
        environment = environment_of_job()
        if GROUP_VARIABLE not in os.environ:
            environment[GROUP_VARIABLE] = Path(settings.sweep.dir).name
        arguments = [*self._flags, *lines, *self._fixed]
        outcome = _judge(job, run_process(self._command.module, arguments, environment=environment, log=log))
        reason = outcome.reason.removeprefix(f"{self._command.name}: ")
        return outcome._replace(reason=reason if log is None or not reason else f"{reason}; see {log}")

    def _run_here(self, cfg: dict[str, Any], job: JobOutcome) -> JobOutcome:
        command = self._command
        try:
            with hold_run(cfg) if command.run_folder is not None else contextlib.nullcontext():
                code = resolve(command.run)(cfg)
        except Exception as error:
            if (mistake := find_user_error(error, place_of(command, cfg))) is None:
                return job._replace(state="failed", reason=describe_crash(error))
            report_problems(command.name, mistake)
            return job._replace(state="refused", reason=format_problem(find_problems(mistake)[0]))
        return _judge(job, Ended(code or 0, ""))


def runs_here(settings: Any) -> bool:
    """Whether the jobs of a sweep run on this machine, one after the other or side by side.

    A cluster starts jobs with their ranks, and again where they were interrupted, and knows what became of them.
    """
    return _launcher(settings) in ("BasicLauncher", "JoblibLauncher", "LocalLauncher")


def is_alone(settings: Any) -> bool:
    """Whether the jobs of a sweep run one after the other, so that each may have the terminal."""
    return _launcher(settings) == "BasicLauncher"


def is_silent(settings: Any) -> bool:
    """Whether what the jobs of a sweep say does not reach the terminal."""
    return _launcher(settings) == "LocalLauncher"


def _task_lines(settings: Any) -> list[str]:
    """The overrides of a job as they were given: what refers to another key still does."""
    lines: Any = OmegaConf.to_container(settings.overrides.task, resolve=False)
    return list(lines)


def _launcher(settings: Any) -> str:
    return str(settings.launcher._target_).rpartition(".")[2]


def _judge(job: JobOutcome, ended: Ended) -> JobOutcome:
    """What became of a job, by its exit code."""
    if ended.code in (0, EXIT_PRUNED):
        return job._replace(state="finished" if ended.code == 0 else "pruned")
    reason = ended.said if ended.said else f"exit code {ended.code}"
    if ended.code - 128 in set(signal.Signals):  # it could not say anything
        reason = f"ended by {signal.Signals(ended.code - 128).name}"
    return job._replace(state="refused" if ended.code == EXIT_USER_ERROR else "failed", reason=reason)


def rename(command: Command, cfg: dict[str, Any], swept: Sequence[str], name: str | None = None) -> str | None:
    """Gives one job of a sweep its own run name, by default derived from what is swept; returns it."""
    run = cfg.get("run")
    if command.run_folder is None or not isinstance(run, dict) or not isinstance(run.get("name"), str):
        return None
    run["name"] = name or job_name(run["name"], swept)
    return str(run["name"])


def hydra_line(key: str, value: str) -> str:
    """An override whose value Hydra reads literally, whatever is in it."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{key}="{escaped}"'


def report_problems(name: str, error: UserError) -> None:
    """Prints a user error on stderr: one line, or a list; only the first of several ranks speaks."""
    if not is_first_rank():
        return
    problems = list(dict.fromkeys(map(format_problem, find_problems(error))))
    if len(problems) == 1:
        say(f"{name}: {problems[0]}", error=True)
    else:
        say(f"{name}: {len(problems)} problems:", error=True)
        say(*(f"  {problem}" for problem in problems), error=True)


def resolve(function: Callable[..., Any] | str) -> Callable[..., Any]:
    """A function of a command, which may be named as `module:function`."""
    return pkgutil.resolve_name(function) if isinstance(function, str) else function


@contextlib.contextmanager
def named_place(command: Command, cfg: dict[str, Any] | None) -> Iterator[None]:
    """Makes a user's error of a full disk before the job."""
    try:
        yield
    except OSError as error:
        mistake = None if cfg is None else find_user_error(error, place_of(command, cfg))
        raise mistake or error from error


def place_of(command: Command, cfg: dict[str, Any]) -> object:
    """Where a command writes; None if its configuration does not say."""
    return command.run_folder(cfg) if command.run_folder is not None else cfg.get("output")


def find_user_error(error: BaseException | None, place: object) -> UserError | None:
    """The user's mistake among the causes of an error, also where Lightning found it.

    A full disk is one that can happen at any file of `place`.
    """
    while error is not None and not isinstance(error, UserError):
        if isinstance(error, OSError) and is_full(error):
            where = f" for {error.filename}" if error.filename else f" in {place}" if place else ""
            return UserError(f"{error.strerror}{where}: make room there and start again; what is finished is kept")
        if type(error).__name__ == _OF_LIGHTNING:  # which is not imported for its name alone
            return UserError(" ".join(str(error).split()))
        error = error.__cause__
    return error
