"""The jobs of a sweep: a file for each in the sweep's folder, whoever runs it, says what became of it.

`jobs/NAME.json` is written when a job begins and when it ends, so that the sweep can be continued, and its runs found.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from m2_encoder.errors import in_one_line
from m2_encoder.files import write_json

JOBS_FOLDER: Final = "jobs"
State = Literal["at work", "finished", "skipped", "pruned", "refused", "failed", "not run"]

_NO_PART: Final = ("name", "resume", "metric")  # settings of a run that change nothing of it
EXIT_PRUNED: Final = 3
"""The exit code of a trial that its search has ended early."""


class JobOutcome(NamedTuple):
    """What became of one job."""

    name: str
    # skipped: it was finished before; pruned: ended early by a search; refused: the user can mend it; failed: the rest
    state: State
    folder: str = ""  # of its run, if it has one
    reason: str = ""  # of a job that did not finish, one line
    swept: Sequence[str] = ()  # the overrides that tell it from the other jobs
    settings: str = ""  # `settings_digest` of its configuration
    seconds: float = 0.0  # that its process took
    value: float | None = None  # of `run.metric`


def write_outcome(sweep: Path, outcome: JobOutcome) -> None:
    """Keeps what is known of a job now; when it was begun, each time, stays."""
    path = sweep / JOBS_FOLDER / f"{outcome.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = list((_read(path) or {}).get("begun", []))
    if outcome.state == "at work":
        begun.append(time.strftime("%Y-%m-%d %H:%M:%S"))
    # Not the time of the file, whose clock may be some milliseconds behind.
    write_json(path, {**outcome._asdict(), "begun": begun, "written": time.time()})


def read_outcomes(sweep: Path, names: Sequence[str] | None, *, since: float) -> list[JobOutcome]:
    """Outcomes of the jobs `names` in their order, or of all that began or ended after `since`, the last one last.

    `since` is in seconds since the epoch.
    """
    contents = [each for each in _read_all(sweep) if each.get("written", 0) >= since]
    found = {each["name"]: _outcome(each) for each in sorted(contents, key=lambda each: float(each.get("written", 0)))}
    if names is None:
        return list(found.values())
    return [found.get(name) or JobOutcome(name, "not run", reason="it was not started") for name in names]


def read_jobs(sweep: Path) -> list[JobOutcome]:
    """What is known of every job that a sweep's folder has ever had; nothing for another folder."""
    return [_outcome(content) for content in _read_all(sweep)]


def _read_all(sweep: Path) -> list[dict[str, Any]]:
    contents = map(_read, sorted((sweep / JOBS_FOLDER).glob("*.json")))
    return [content for content in contents if content is not None and {"name", "state"} <= content.keys()]


def _read(path: Path) -> dict[str, Any] | None:
    """None for a file that is not there or cannot be read: the job is begun again, and its run goes on."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _outcome(content: Mapping[str, Any]) -> JobOutcome:
    return JobOutcome(**{key: value for key, value in content.items() if key in JobOutcome._fields})


def settings_digest(cfg: Mapping[str, Any]) -> str:
    """What a job is known by, however its overrides are written: its configuration, but for the name of its run."""
    run = cfg.get("run")
    kept = {key: value for key, value in run.items() if key not in _NO_PART} if isinstance(run, dict) else run
    text = json.dumps({**cfg, "run": kept}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe_crash(error: BaseException) -> str:
    """An unexpected error in one line; its traceback goes to stderr."""
    traceback.print_exception(error, file=sys.stderr)
    return in_one_line(error)


def describe_job(outcome: JobOutcome, number: int, outcomes: Sequence[JobOutcome] | None, *, since: float) -> str:
    """A line on a job that begins or has ended, with what is left where all `outcomes` of the sweep are known."""
    title = f"{number + 1}{'' if outcomes is None else f'/{len(outcomes)}'} {outcome.name}"
    if outcome.state == "at work":
        return title
    if outcome.state == "skipped":
        return f"{title}: has finished before"
    what = f"{outcome.state} ({outcome.reason})" if outcome.reason else outcome.state
    return f"{title}: {what}" + ("" if outcomes is None else f"; {describe_rest(outcomes, since=since)}")


@contextlib.contextmanager
def telling(sweep: Path, names: Sequence[str], *, since: float, say: Callable[[str], None]) -> Iterator[None]:
    """While inside, says what becomes of each job, for launchers whose jobs have no way to the terminal."""
    told: dict[str, State] = {}
    is_over = threading.Event()

    def look() -> None:
        outcomes = read_outcomes(sweep, names, since=since)
        for number, outcome in enumerate(outcomes):
            if outcome.state not in ("not run", told.get(outcome.name)):
                told[outcome.name] = outcome.state
                say(describe_job(outcome, number, outcomes, since=since))

    def follow() -> None:
        while not is_over.wait(0.5):
            look()
        look()

    thread = threading.Thread(target=follow, name="sweep", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def describe_rest(outcomes: Sequence[JobOutcome], *, since: float) -> str:
    """How many jobs have not ended, and how long they may take if they are like those that ran after `since`."""
    left = sum(each.state in ("at work", "not run") for each in outcomes)
    ran = sum(each.state == "finished" for each in outcomes)
    if not left or not ran:
        return f"{left} left"
    minutes = (time.time() - since) / ran * left / 60
    return f"{left} left, about {minutes:.0f} min" if minutes >= 1 else f"{left} left, less than a minute"


def describe_outcomes(outcomes: Sequence[JobOutcome]) -> list[str]:
    """A line on all jobs that have ended or been killed, and one for each that did not finish."""
    silent = "its process ended without a word"
    ended = [each._replace(state="failed", reason=silent) if each.state == "at work" else each for each in outcomes]
    words = [{"skipped": "finished before"}.get(each.state, each.state) for each in ended]
    line = f"{len(ended)} {'job' if len(ended) == 1 else 'jobs'}: " + ", ".join(
        f"{words.count(word)} {word}" for word in dict.fromkeys(words)
    )
    rest = [f"  {each.name}: {each.state} ({each.reason})" for each in ended if not is_done(each)]
    return [line, *rest]


def is_done(outcome: JobOutcome) -> bool:
    """Whether there is nothing left to do."""
    return outcome.state in ("finished", "skipped", "pruned")
