"""Every fault of data, injected into real shards under the real loader: batches stay full, counts are exact."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fault_runs import BATCH, STEPS, Outcome, damaged_set, expect, run_ranks
from tests.support.faults import Fault, faults


@pytest.mark.parametrize("fault", faults(), ids=lambda fault: fault.name.replace(" ", "-"))
def test_batches_stay_full_and_the_same_and_counts_are_exact(tmp_path: Path, fault: Fault) -> None:
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
