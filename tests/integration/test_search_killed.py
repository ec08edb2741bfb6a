"""A search of real runs, killed and started again, finds what one that was left alone finds."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.started import StartedCommand

optuna = pytest.importorskip("optuna")

SMALL = (
    "+experiment=smoke", "run.name=s", "run.export=false", "run.checkpoint_every=2", "evaluation=[retrieval]",
    "trainer.max_steps=8", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1", "scheduler.warmup_steps=1",
    "+callbacks.fail._target_=tests.support.failing.FailAt",
)  # fmt: skip
SEARCH = (
    "-m", "hydra/sweeper=search", "hydra.sweeper.n_trials=8", "optimizer.lr=tag(log,interval(1e-4,1e-1))",
    "+callbacks.fail.step=choice(0,5,9,10,11)", "hydra.sweeper.sampler._target_=optuna.samplers.RandomSampler",
)  # fmt: skip


class Search(StartedCommand):
    """A search, with what its journal holds."""

    def __init__(self, folder: Path, data: Path, repo_root: Path, more: tuple[str, ...]) -> None:
        places = (f"hydra.sweep.dir={folder / 'sweep'}", f"data.folder={data}")
        super().__init__(folder, repo_root, *SEARCH, *SMALL, *places, *more)

    def trials(self) -> list[Any]:
        file = optuna.storages.journal.JournalFileBackend(str(self.folder / "sweep" / "study.journal"))
        study = optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(file))
        return [(t.state.name, t.params, t.value, t.intermediate_values) for t in study.trials]


@pytest.mark.slow
@pytest.mark.parametrize("prunes", [True, False], ids=["pruning", "to the end"])
def test_killed_three_times(prunes: bool, tmp_path: Path, emoji_folder: Path, repo_root: Path) -> None:
    more = ("+hydra.sweeper.pruner.n_startup_trials=1",) if prunes else ("hydra.sweeper.pruner=null",)
    searches = {name: Search(tmp_path / name, emoji_folder, repo_root, more) for name in ("whole", "parts")}
    for search in searches.values():
        search.folder.mkdir()
    assert searches["whole"].start().wait() == 1, "one trial fails, at least"
    search = searches["parts"]
    total = searches["whole"].saved()
    for round_, share in enumerate((0.1, 0.4, 0.7)):
        process = search.start()
        search.wait_for(process, max(search.saved() + 1, round(share * total)))
        if round_ == 1:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        else:  # its job hears of it, or notices
            process.send_signal(signal.SIGKILL if round_ == 0 else signal.SIGTERM)
        assert process.wait() in (-signal.SIGKILL, 128 + signal.SIGTERM)
    assert search.start().wait() == 1
    expected = searches["whole"].trials()
    assert {row[0] for row in expected} == ({"COMPLETE", "FAIL", "PRUNED"} if prunes else {"COMPLETE", "FAIL"})
    assert search.trials() == expected
    assert (search.folder / "sweep" / "sweep.csv").read_text() == (
        searches["whole"].folder / "sweep" / "sweep.csv"
    ).read_text()
    for path in search.folder.glob("s-*/metrics.jsonl"):
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        assert steps == list(range(1, steps[-1] + 1)), "every step once"
    assert _exports(search) == _exports(searches["whole"])


def _exports(search: Search) -> set[str]:
    """The runs that were evaluated at their end."""
    return {path.parent.name for path in search.folder.glob("s-*/summary.json")}
