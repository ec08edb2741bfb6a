"""What became of the jobs of a sweep: a file for each in the sweep's folder, whoever ran it."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from m2_encoder.files import write_json

_FOLDER: Final = "jobs"
State = Literal["finished", "skipped", "pruned", "refused", "failed", "not run"]

EXIT_PRUNED: Final = 3
"""The exit code of a trial that its search has ended early."""


class JobOutcome(NamedTuple):
    """What became of one job."""

    name: str
    # skipped: it was finished before; pruned: ended early by a search; refused: the user can mend it; failed: the rest
    state: State
    folder: str = ""  # of its run, if it has one
    reason: str = ""  # of a job that did not finish, one line
    value: float | None = None  # of `run.metric`


def write_outcome(sweep: Path, outcome: JobOutcome) -> None:
    """Keeps an outcome; a later one of this job takes its place."""
    (sweep / _FOLDER).mkdir(parents=True, exist_ok=True)
    write_json(sweep / _FOLDER / f"{outcome.name}.json", outcome._asdict())


def read_outcomes(sweep: Path, names: Sequence[str] | None, *, since: float) -> list[JobOutcome]:
    """Outcomes of the jobs `names` in their order, or of all that ended after `since` (seconds since the epoch).

    A job without an outcome after `since` was not run, or its process ended without a word.
    """
    found: dict[str, JobOutcome] = {}
    for path in sorted((sweep / _FOLDER).glob("*.json"), key=lambda each: each.stat().st_mtime):
        if path.stat().st_mtime >= since:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            found[path.stem] = JobOutcome(**content)
    if names is None:
        return list(found.values())
    return [found.get(name) or JobOutcome(name, "not run", reason="its process ended without a word") for name in names]


def describe_crash(error: BaseException) -> str:
    """An unexpected error in one line; its traceback goes to stderr."""
    traceback.print_exception(error, file=sys.stderr)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def describe_outcomes(outcomes: Sequence[JobOutcome]) -> list[str]:
    """A line on all jobs, and one for each that did not finish."""
    words = [{"skipped": "finished before"}.get(each.state, each.state) for each in outcomes]
    line = f"{len(outcomes)} jobs: " + ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
    rest = [f"  {each.name}: {each.state} ({each.reason})" for each in outcomes if not is_done(each)]
    return [line, *rest]


def is_done(outcome: JobOutcome) -> bool:
    """Whether there is nothing left to do."""
    return outcome.state in ("finished", "skipped", "pruned")
