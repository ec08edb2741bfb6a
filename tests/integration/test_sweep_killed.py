"""A sweep of real runs, killed and started again, finds what one that was left alone finds, and runs nothing twice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.started import StartedCommand

# Eight jobs; that of seed 100 fails at its fifth step.
SWEEP = (
    "-m", "+experiment=smoke", "run.name=s", "run.export=false", "run.checkpoint_every=2", "evaluation=[retrieval]",
    "trainer.max_steps=8", "trainer.val_check_interval=8", "trainer.log_every_n_steps=1", "scheduler.warmup_steps=1",
    "+callbacks.fail._target_=tests.support.failing.FailAt", "+callbacks.fail.step=${div:500,${seed}}",
    "seed=1,2,3,100", "optimizer.lr=1e-3,2e-3",
)  # fmt: skip
FAILING = {"s-seed=100-lr=0.001", "s-seed=100-lr=0.002"}


class Sweep(StartedCommand):
    """A sweep, with what its folder holds."""

    def __init__(self, folder: Path, data: Path, repo_root: Path, *more: str) -> None:
        folder.mkdir()
        super().__init__(folder, repo_root, *SWEEP, f"data.folder={data}", *more)

    def jobs(self) -> dict[str, dict[str, Any]]:
        found = [json.loads(path.read_text()) for path in self.folder.glob("multirun/s/jobs/*.json")]
        return {each["name"]: each for each in found}

    def summaries(self) -> dict[str, tuple[int, bytes]]:
        """The end of each run that has one: when it was written, and its content."""
        paths = self.folder.glob("s-*/summary.json")
        return {path.parent.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}

    def table(self) -> str:
        return (self.folder / "multirun" / "s" / "sweep.csv").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [(), ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), ("hydra/launcher=submitit_local",)],
    ids=["one by one", "joblib", "submitit"],
)
def test_killed_three_times(tmp_path: Path, emoji_folder: Path, repo_root: Path, launcher: tuple[str, ...]) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    batch = ("hydra.sweeper.max_batch_size=2",) if launcher else ()
    whole = Sweep(tmp_path / "whole", emoji_folder, repo_root)
    parts = Sweep(tmp_path / "parts", emoji_folder, repo_root, *launcher, *batch)
    assert whole.start().wait() == 1
    total = whole.saved()
    ended: dict[str, tuple[int, bytes]] = {}
    for turn, share in enumerate((0.1, 0.4, 0.7)):
        process = parts.start()
        parts.wait_for(process, max(parts.saved() + 1, round(share * total)))
        if turn == 0:
            process.send_signal(signal.SIGKILL)  # its jobs hear of it themselves
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL if turn == 1 else signal.SIGINT)
        assert process.wait() != 0
        ended |= {name: end for name, end in parts.summaries().items() if name not in ended}
    assert parts.start().wait() == 1
    assert {name: end for name, end in parts.summaries().items() if name in ended} == ended, "none ended twice"
    jobs = parts.jobs()
    assert {name for name, each in jobs.items() if each["state"] == "failed"} == FAILING
    assert {each["state"] for name, each in jobs.items() if name not in FAILING} == {"finished", "skipped"}
    for path in parts.folder.glob("s-*/metrics.jsonl"):
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        assert steps == list(range(1, steps[-1] + 1)), "every step once"
    assert parts.table() == whole.table()
    assert parts.start().wait() == 1  # the failed ones fail again, and nothing else runs
    assert parts.summaries().keys() == whole.summaries().keys()
    assert parts.table() == whole.table()
