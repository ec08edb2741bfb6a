"""Every fault of data, injected into real shards under the real loader: batches stay full, counts are exact."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support.data_fault_table import DOCUMENT, fatal_row, survivor_row
from tests.support.fault_commands import RUN, Fatal, arguments, end, fatals, run_train
from tests.support.fault_runs import (
    BATCH,
    STEPS,
    Outcome,
    damaged_set,
    expect,
    make_rank,
    read_list,
    run_ranks,
    settings,
)
from tests.support.fault_table import COMMAND, Row, read_rows
from tests.support.faults import Fault, faults, write_set
from tests.support.slow_parts import mark_most
from tests.support.training import LIGHTNING_WARNINGS

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]


@pytest.fixture(scope="module")
def documented(repo_root: Path) -> dict[str, Row]:
    return read_rows((repo_root / DOCUMENT.path).read_text(encoding="utf-8"))


def test_the_document_has_every_fault_in_its_order(documented: dict[str, Row]) -> None:
    assert list(documented) == [fault.name for fault in (*faults(), *fatals())]


@pytest.fixture(autouse=True)
def _in_the_checkout(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo_root)


@pytest.mark.parametrize("fault", mark_most((each,) for each in faults()))
def test_batches_stay_full_and_the_same_and_counts_are_exact(
    tmp_path: Path, fault: Fault, documented: dict[str, Row]
) -> None:
    runs: dict[tuple[int, int], Outcome] = {}
    for workers, world in ((0, 1), (2, 1), (0, 2)):
        folder = tmp_path / f"{workers}-{world}"
        with damaged_set(folder, fault) as (values, server):
            values["num_workers"] = workers
            runs[workers, world] = run_ranks(values, folder, folder / "run", fault, server=server, world=world)
    expected = expect(runs[0, 1].plan, fault)
    assert all(len(batch) == BATCH for batch in expected.keys)
    assert expected.drawn.total() + expected.at_start.total() >= len(fault.entries), "the run has to meet the fault"
    for run in runs.values():
        assert len(run.keys) == STEPS
        assert run.keys == expected.keys
        assert run.digests == runs[0, 1].digests
        assert run.drawn == expected.drawn
        assert run.at_start == expected.at_start
        found = [(entry["shard"].rpartition("/")[2], entry["key"], entry["reason"]) for entry in run.listed]
        assert len(found) == len(set(found))
        assert set(found) == expected.listed
        assert {entry["source"] for entry in run.listed} == {"a"}
        assert all("\n" not in entry["detail"] and entry["detail"] for entry in run.listed)
    row = survivor_row(fault, runs[0, 1], tmp_path / "0-1")
    assert documented[fault.name].rest == row.rest, f"write {DOCUMENT.path} anew: {COMMAND}"


@pytest.mark.parametrize("fatal", mark_most((each,) for each in fatals()))
def test_what_ends_a_run_is_one_clear_line(tmp_path: Path, fatal: Fatal, documented: dict[str, Row]) -> None:
    ended = end(fatal, tmp_path)
    assert ended.code == 2, ended.err
    assert "Traceback" not in ended.err + ended.out
    said = [line for line in ended.err.splitlines() if line.startswith("m2-train: ")]
    assert len(said) == 1, ended.err
    assert re.search(fatal.message, said[0]), said[0]
    assert documented[fatal.name].rest == fatal_row(fatal, ended, tmp_path).rest


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["PNG cut in half", "sample without a caption", "tar cut in an image"])
def test_metrics_of_a_run_are_the_truth(tmp_path: Path, name: str, workers: int) -> None:
    fault = next(fault for fault in faults() if fault.name == name)
    write_set(tmp_path, fault)
    ended = run_train(tmp_path, f"data.num_workers={workers}")
    assert ended.code == 0, ended.err
    expected = expect(make_rank(settings(f"{tmp_path}/a/*.tar", tmp_path), tmp_path)._plan((), 0), fault)
    run = tmp_path / "outputs" / RUN
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    prefix = "data/skipped/"
    counts = Counter({k.removeprefix(prefix): v for record in records for k, v in record.items() if prefix in k})
    assert counts == expected.drawn + expected.at_start
    assert {(Path(e["shard"]).name, e["key"], e["reason"]) for e in read_list(run)} == expected.listed
    assert len(read_list(run)) == len(expected.listed)


@pytest.mark.slow
def test_a_rank_that_meets_too_many_bad_samples_ends_all_of_them(tmp_path: Path, repo_root: Path) -> None:
    write_set(tmp_path, next(fault for fault in faults() if fault.name == "JPEG cut in half"))
    limits = ["data.max_bad_samples=0", "data.check=null"]
    line = arguments(tmp_path, *limits, "strategy=ddp", "trainer.devices=2", max_steps=2000)
    done = subprocess.run(
        [sys.executable, "-m", "m2_encoder.cli.train", *line],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=repo_root,
        env={**os.environ, "PYTHONPATH": str(repo_root / "src")},
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "1.tar:000017: undecodable_image" in done.stderr
    assert len(read_list(tmp_path / "outputs" / RUN)) == 1
