from __future__ import annotations

from pathlib import Path

from benchmarks._journal import Journal


def test_an_interrupted_run_finds_what_it_had(tmp_path: Path) -> None:
    path = tmp_path / "results.json.partial"
    first = Journal(path, {"rows": 64})
    first.add("0 ms", {"seconds": 1.5})
    first.add("5 ms", {"seconds": 2.5})
    again = Journal(path, {"rows": 64})
    assert again.found == {"0 ms": {"seconds": 1.5}, "5 ms": {"seconds": 2.5}}
    again.remove()
    assert not list(tmp_path.iterdir())


def test_another_measurement_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "results.json.partial"
    Journal(path, {"rows": 64}).add("0 ms", {"seconds": 1.5})
    other = Journal(path, {"rows": 128})
    assert other.found == {}
    other.add("5 ms", {"seconds": 2.5})
    assert Journal(path, {"rows": 128}).found == {"5 ms": {"seconds": 2.5}}


def test_without_a_file_nothing_is_written(tmp_path: Path) -> None:
    journal = Journal(None, {})
    journal.add("0 ms", {"seconds": 1.5})
    assert journal.found == {"0 ms": {"seconds": 1.5}}
    journal.remove()
    assert not list(tmp_path.iterdir())
