"""What every console command does: it composes a configuration with Hydra, checks it, and runs.

A `Command` describes one; all are in `cli/commands.py`. Its functions get plain, resolved containers (`dict`, `list`,
scalars). `check` returns a `Problem` for each mistake; a value that is missing or cannot be resolved is `UNSET` there
and has been reported. `run` is called only when nothing is wrong; it may raise a `UserError`, whose message is printed
without a traceback.

Exit codes: 0 done, 2 the user can mend it (all problems on stderr), 130 interrupted, 1 anything else; a command may
return its own. `HYDRA_FULL_ERROR=1` shows the traceback of a user error, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import hydra
from hydra.types import RunMode

from m2_encoder.config.arguments import Arguments, parse_arguments
from m2_encoder.config.compose import HYDRA_VERSION_BASE, Composer, Composition, open_composer
from m2_encoder.config.groups import lend_groups
from m2_encoder.config.help import read_values, render_help
from m2_encoder.config.job import (
    EXIT_USER_ERROR,
    FULL_ERROR,
    Job,
    hydra_line,
    is_silent,
    named_place,
    rename,
    report_problems,
    resolve,
    runs_here,
)
from m2_encoder.config.output import lasting_output, say
from m2_encoder.config.overrides import put_last, quote_unreadable
from m2_encoder.config.paths import anchor, check_checkout, find_conf
from m2_encoder.config.problems import format_problem, refuse_all
from m2_encoder.config.run_folder import hold_run
from m2_encoder.config.sweep_jobs import (
    JobOutcome,
    describe_outcomes,
    is_done,
    read_jobs,
    read_outcomes,
    settings_digest,
    telling,
)
from m2_encoder.config.sweep_life import await_run, end_with_sweep, hold_sweep, refuse_second
from m2_encoder.config.sweeps import (
    expand_sweep,
    is_basic,
    is_search,
    is_sweep_line,
    job_name,
    name_globbed,
    preset_lines,
    without_constant,
)
from m2_encoder.config.targets import add_to_path
from m2_encoder.config.trusted import check_choices, check_values_only, find_foreign, read_folders, trusted_targets
from m2_encoder.distributed.ranks import is_only_rank
from m2_encoder.errors import Problem, UserError

EXIT_INTERRUPTED: Final = 130


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """One console command.

    Functions are given as they are, or as `module:function` to be imported when they are called.

    Attributes:
        name: what the user types.
        config_name: the primary configuration, without suffix.
        summary: one sentence for `--help`.
        examples: command lines for `--help`.
        check: finds what is wrong with a configuration; nothing heavy, nothing written.
        run: does the work; its return value is the exit code (None is 0).
        run_folder: the folder of a run, for commands that have one: Hydra's records go there.
        complete: more overrides that follow from the configuration and the folder it was read from; only asked for when
            this process is the only rank so far.
        notes: more lines for `--help`, such as exit codes of its own.
        check_late: what takes long to check, because it imports Lightning, is checked here if nothing else is wrong.
            Both checks then get `changed=`: the keys that have other values than shipped files, or None if not known.
        check_job: what else each job of a sweep is checked for, before the first one starts.
        config_folder: the sub-folder of `conf/` with the primary configuration. Without groups in it, `model=PATH` is a
            plain value, although `conf/` has a group of that name.
        groups: of `conf/` that such a command has all the same.
        is_done: whether the run of a configuration has ended, so that a sweep need not start it again.
        module: what `python -m` runs the command by; each job of a sweep is then a process of its own.
        end_sweep: tells what a sweep found; it gets its folder and all outcomes.
        measure: the number of a run that has ended, which sweepers get.
    """

    name: str
    config_name: str
    summary: str
    examples: tuple[str, ...]
    check: Callable[..., Sequence[Problem]] | str
    run: Callable[[dict[str, Any]], int | None] | str
    run_folder: Callable[[dict[str, Any]], Path] | None = None
    complete: Callable[[dict[str, Any], Path, Sequence[str]], list[str]] | str | None = None
    notes: tuple[str, ...] = ()
    check_late: str = ""
    check_job: str = ""
    config_folder: str = ""
    groups: tuple[str, ...] = ()
    is_done: Callable[[dict[str, Any]], bool] | str = ""
    module: str = ""
    end_sweep: Callable[[Path, Sequence[JobOutcome]], None] | str = ""
    measure: Callable[[dict[str, Any]], float | None] | str = ""

    def __call__(self) -> int:
        """Runs the command with the arguments of this process; its exit code."""
        return run_command(self)


class _Plan(NamedTuple):
    """A validated command line."""

    argv: list[str]  # overrides to start Hydra with
    constant_lines: list[str]  # those that a sweep does not vary
    run: dict[str, Any] | None = None  # the configuration of the one run that is to be started in a folder of its own
    sweep: _Sweep | None = None  # several runs


class _Sweep(NamedTuple):
    """Several runs of one command line."""

    folder: Path
    names: list[str] | None  # of its jobs; None where the sweeper decides them later
    is_here: bool  # they run on this machine
    is_silent: bool  # they do not reach the terminal
    refused: dict[str, str]  # the jobs that are not run, with the reason in one line


def run_command(command: Command, argv: Sequence[str] | None = None) -> int:
    """Runs a command with arguments, those of `sys.argv` by default, and returns its exit code."""
    with lasting_output():
        return _run_command(command, sys.argv[1:] if argv is None else argv)


def _run_command(command: Command, argv: Sequence[str]) -> int:
    started_argv = sys.argv
    end_with_sweep()
    try:
        with lend_groups(command.groups):
            return _run(command, argv)
    except KeyboardInterrupt:
        say("", f"{command.name}: interrupted", error=True)
        return EXIT_INTERRUPTED
    except UserError as error:
        if os.environ.get(FULL_ERROR) == "1":
            raise
        report_problems(command.name, error)
        return EXIT_USER_ERROR
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        report_problems(command.name, UserError(f"{error.strerror}: {error.filename}"))
        return EXIT_USER_ERROR
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = started_argv


def _run(command: Command, argv: Sequence[str]) -> int:
    check_checkout()
    arguments = parse_arguments(command.name, argv)
    folder = arguments.config_path or find_conf() / command.config_folder
    config_name = arguments.config_name or command.config_name
    fixed = [f'hydra.searchpath=["file://{arguments.config_dir}"]'] if arguments.config_dir else []
    # Ranks that Lightning starts get the folder as an override.
    given = [line for line in arguments.overrides if line.startswith("hydra.searchpath=")]
    if fixed and given:
        raise UserError(f"{given[0]}: --config-dir is given, too; name all folders in this one")
    fixed += given
    add_to_path(folder for line in fixed for folder in read_folders(line))  # the user's own word, as what it names
    lines = [quote_unreadable(line, multirun=arguments.multirun) for line in arguments.overrides if line not in fixed]
    arguments = arguments._replace(overrides=put_last(lines))
    trusted = _find_trusted(arguments, config_name, fixed)
    with open_composer(folder, config_name, fixed) as composer:
        if arguments.help:
            values = read_values(find_conf() / command.config_folder / f"{command.config_name}.yaml")
            print(render_help(command, composer.groups(), chosen=composer.chosen(), values=values))
            return 0
        plan = _plan(command, arguments, composer, trusted)
    # Hydra reads sys.argv, and so does Lightning when it starts the other ranks with this command line.
    sys.argv = [sys.argv[0], *arguments.flags, *plan.argv, *fixed]
    sweep = plan.sweep
    names, refused = (None, None) if sweep is None else (sweep.names, sweep.refused)
    job = Job(command, plan.constant_lines, folder, arguments.flags, fixed, names, refused)
    started = time.time()
    held: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if plan.run is not None:
        held = hold_run(plan.run)
    elif sweep is not None and sweep.is_here:
        held = _running(command, sweep, started)
    with held:
        with named_place(command, plan.run), job.hydra_raises():  # Hydra writes into its folder, too
            try:
                hydra.main(config_path=str(folder), config_name=config_name, version_base=HYDRA_VERSION_BASE)(job)()
            except SystemExit as stop:
                if not arguments.shows_only or not stop.code:
                    raise
                return EXIT_USER_ERROR  # a package that is not there, a reference to what is not given
        return job.exit_code if sweep is None or not sweep.is_here else _end_sweep(command, sweep, started)


@contextlib.contextmanager
def _running(command: Command, sweep: _Sweep, started: float) -> Iterator[None]:
    """While a sweep runs: it is the only one in its folder, and says what it has left when a signal ends it."""

    def tell(line: str) -> None:
        say(f"{command.name}: {line}", error=True)

    with contextlib.ExitStack() as stack:
        stack.enter_context(hold_sweep(sweep.folder))
        if sweep.is_silent and sweep.names is not None:
            stack.enter_context(telling(sweep.folder, sweep.names, since=started, say=tell))
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            outcomes = read_outcomes(sweep.folder, sweep.names, since=started)
            tell(f"{sum(map(is_done, outcomes))} of {len(outcomes)} jobs are done; the same command goes on")
            raise


def _end_sweep(command: Command, sweep: _Sweep, started: float) -> int:
    """Says what became of the jobs; 1 if any did not finish."""
    outcomes = read_outcomes(sweep.folder, sweep.names, since=started)
    if command.end_sweep and any(map(is_done, outcomes)):
        resolve(command.end_sweep)(sweep.folder, outcomes)
    done = all(map(is_done, outcomes))
    first, *rest = describe_outcomes(outcomes)
    say(f"{command.name}: {first}", *rest, error=True)
    if not done and command.run_folder is not None and sweep.names is not None:
        say(f"{command.name}: the same command runs what is left", error=True)
    return 0 if done else 1


def _find_trusted(arguments: Arguments, config_name: str, fixed: Sequence[str]) -> frozenset[str] | None:
    """The targets that a configuration given by `--config-path` may name; None for one of ours or of the user's.

    Raises:
        UserError: if it holds more than values.
    """
    folder, folders = arguments.config_path, [each for line in fixed for each in read_folders(line)]
    if folder is None or any(folder.resolve().is_relative_to(each.resolve()) for each in (find_conf(), *folders)):
        return None
    check_values_only(folder / f"{config_name}.yaml")
    return trusted_targets(arguments.overrides, folders)


def _plan(command: Command, arguments: Arguments, composer: Composer, trusted: frozenset[str] | None) -> _Plan:
    """Validates the command line as a whole and completes it with Hydra's settings.

    Raises:
        UserError: with everything that is wrong.
    """
    lines = composer.update(name_globbed([*arguments.overrides], composer.options))
    if arguments.shows_only:
        composition = composer.compose(lines)
        refuse_all(composition.refused)  # what is not given yet is shown as ???
        return _Plan([*lines, *(f"~{key}" for key in composition.unchosen)], lines)
    constant = [line for line in lines if not is_sweep_line(line)]
    first = composer.compose(constant)
    mode = first.hydra.mode
    if arguments.multirun or mode == RunMode.MULTIRUN:
        return _plan_sweep(command, composer, lines, first, trusted)
    composition = first if constant == lines else composer.compose(lines)
    if command.complete is not None and not composition.problems and is_only_rank():
        more = resolve(command.complete)(composition.cfg, composer.folder, lines)
        lines, composition = (lines + more, composer.compose(lines + more)) if more else (lines, composition)
    refuse_all(_find_problems(command, composition, composer.folder, trusted))
    run = None if command.run_folder is None else composition.cfg
    return _Plan([*lines, *_quiet(lines), *_folder_lines(command, composition.cfg, lines)], lines, run)


def _plan_sweep(
    command: Command, composer: Composer, lines: list[str], first: Composition, trusted: frozenset[str] | None
) -> _Plan:
    """Validates every job before the first one starts, and names them as they were named before.

    A job whose values are refused does not keep the others from running; a line that no job can have, or a run that is
    there with other settings, is refused for all.
    """
    folder = _sweep_folder(lines, first)
    sweep = _Sweep(folder, None, runs_here(first.hydra), is_silent(first.hydra), {})
    if sweep.is_here:
        refuse_second(folder)
    goes_on = "resume" in (first.cfg.get("run") or {}) and not any("run.resume=" in line for line in lines)
    lines = [*lines, "run.resume=auto"] if goes_on else lines
    preset = preset_lines(first.hydra, lines)
    constant = [line for line in (*preset, *lines) if not is_sweep_line(line)]
    if is_search(first.hydra):
        check = resolve("m2_encoder.search.check:check_search")

        def find(job: list[str]) -> Sequence[Problem]:
            return _find_problems(command, composer.compose(job), composer.folder, trusted)

        refuse_all(check(lines, first.hydra, find))
        return _sweep_plan(lines, constant, sweep)
    known = {each.settings: each for each in read_jobs(folder) if each.settings}
    problems: list[Problem] = []
    names: list[str] = []
    refused: dict[str, Sequence[Problem]] = {}
    for job in expand_sweep(lines, first.hydra):
        composition = composer.compose(job)
        swept = without_constant(job, constant)
        before = known.get(settings_digest(composition.cfg))
        name = rename(command, composition.cfg, swept, before.name if before and before.name not in names else None)
        name = name or job_name(command.name, swept)
        if sweep.is_here and before is not None and before.state == "at work":
            await_run(Path(before.folder))
        found = _find_problems(command, composition, composer.folder, trusted)
        if found and (composition.problems or trusted is not None):
            problems += found
        elif found:
            refused[name] = found
        elif command.check_job:
            problems += resolve(command.check_job)(composition.cfg, as_before=goes_on)
        if name in names and command.run_folder is not None:
            problems.append(Problem("run.name", name, "two jobs of the sweep have this name", "sweep distinct values"))
        names.append(name)
    if problems or len(refused) == len(names):
        refuse_all([*problems, *itertools.chain(*refused.values())])
    # Hydra composes what is not swept alone, before any job.
    fix = "it needs what is swept; sweep it, too, as in KEY=choice(VALUE)"
    refuse_all([each._replace(fix="; ".join(filter(None, (each.fix, fix)))) for each in first.refused])
    reasons = {name: "; ".join(map(format_problem, found)) for name, found in refused.items()}
    if reasons:
        told = (f"  {name}: {reason}" for name, reason in reasons.items())
        say(f"{command.name}: {len(reasons)} of {len(names)} jobs are refused; the others run:", *told, error=True)
    known_names = names if is_basic(first.hydra) else None
    return _sweep_plan(lines, constant, sweep._replace(names=known_names, refused=reasons))


def _sweep_plan(lines: list[str], constant: list[str], sweep: _Sweep) -> _Plan:
    return _Plan([*lines, *_quiet(lines), hydra_line("hydra.sweep.dir", str(sweep.folder))], constant, sweep=sweep)


def _find_problems(
    command: Command, composition: Composition, folder: Path, trusted: frozenset[str] | None
) -> list[Problem]:
    if trusted is not None:
        check_choices(composition.hydra.runtime.choices, folder)
        if foreign := list(find_foreign(composition.cfg, trusted)):
            return foreign  # before anything imports them
    cfg, more = composition.cfg, {"changed": composition.changed} if command.check_late else {}
    problems = [*composition.problems, *resolve(command.check)(cfg, **more)]
    if command.check_late and not problems:
        problems = resolve(command.check_late)(cfg, **more)
    return composition.without_echoes(problems)


def _quiet(lines: Sequence[str]) -> list[str]:
    """Hydra's own logging off: the commands speak for themselves."""
    wanted = ("hydra/job_logging=none", "hydra/hydra_logging=none")
    return [line for line in wanted if not any(given.startswith(line.partition("=")[0]) for given in lines)]


def _folder_lines(command: Command, cfg: dict[str, Any], lines: Sequence[str]) -> list[str]:
    """Where Hydra keeps its records: in the run's folder, or nowhere."""
    if any(line.startswith("hydra.run.dir=") for line in lines):
        return []
    if command.run_folder is None:
        return ["hydra.run.dir=.", "hydra.output_subdir=null"]
    return [hydra_line("hydra.run.dir", str(command.run_folder(cfg)))]


def _sweep_folder(lines: Sequence[str], composition: Composition) -> Path:
    """The user's, or `<run.folder>/multirun/<run.name>`, which the same sweep finds again."""
    if any(line.startswith("hydra.sweep.dir=") for line in lines):
        return Path(composition.hydra.sweep.dir).absolute()
    run = composition.cfg.get("run")
    if isinstance(run, dict) and isinstance(run.get("folder"), str):
        return anchor(run["folder"]) / "multirun" / str(run.get("name"))
    return anchor("outputs") / "multirun" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
