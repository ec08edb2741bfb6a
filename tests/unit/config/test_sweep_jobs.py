"""What is kept of the jobs of a sweep."""

from __future__ import annotations

import time
from pathlib import Path

from m2_encoder.config.sweep_jobs import (
    JobOutcome,
    describe_outcomes,
    describe_rest,
    read_jobs,
    read_outcomes,
    settings_digest,
    write_outcome,
)

NAMES = ["a", "b", "c", "d"]


def test_outcomes_of_this_start_in_their_order(tmp_path: Path) -> None:
    write_outcome(tmp_path, JobOutcome("d", "finished"))
    since = time.time()
    for name, state in (("c", "finished"), ("a", "at work"), ("c", "skipped")):
        write_outcome(tmp_path, JobOutcome(name, state))  # type: ignore[arg-type]
    found = read_outcomes(tmp_path, NAMES, since=since)
    assert [each.state for each in found] == ["at work", "not run", "skipped", "not run"]
    assert [each.name for each in read_outcomes(tmp_path, None, since=since)] == ["a", "c"]
    assert describe_outcomes(found) == [
        "4 jobs: 1 failed, 2 not run, 1 finished before",
        "  a: failed (its process ended without a word)",
        "  b: not run (it was not started)",
        "  d: not run (it was not started)",
    ]


def test_a_damaged_file_is_as_good_as_none(tmp_path: Path) -> None:
    write_outcome(tmp_path, JobOutcome("a", "finished", "outputs/a", swept=("x=1",)))
    (tmp_path / "jobs" / "b.json").write_text("{", encoding="utf-8")
    (tmp_path / "jobs" / "c.json").write_text("[]", encoding="utf-8")
    assert read_jobs(tmp_path) == [JobOutcome("a", "finished", "outputs/a", swept=["x=1"])]
    write_outcome(tmp_path, JobOutcome("b", "at work"))
    assert [each.name for each in read_jobs(tmp_path)] == ["a", "b"]
    assert read_jobs(tmp_path / "elsewhere") == []


def test_what_is_left_and_how_long_it_may_take() -> None:
    done, left = JobOutcome("a", "finished"), JobOutcome("b", "not run")
    assert describe_rest([done, done], since=0) == "0 left"
    assert describe_rest([left, left], since=0) == "2 left"
    assert describe_rest([done, left], since=time.time() - 10) == "1 left, less than a minute"
    assert describe_rest([done, left, left], since=time.time() - 120) == "2 left, about 4 min"


def test_a_job_is_known_by_all_but_its_name() -> None:
    digest = settings_digest({"x": 1, "run": {"name": "a", "resume": "never", "folder": "f"}})
    assert digest == settings_digest({"run": {"folder": "f", "name": "b", "resume": "auto"}, "x": 1})
    assert digest != settings_digest({"run": {"folder": "f", "name": "b", "resume": "auto"}, "x": 2})
    assert settings_digest({"x": 1}) != settings_digest({"x": 1.5})
