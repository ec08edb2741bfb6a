"""Ranks that end together: no process is left in a collective call, and the rank with the cause speaks."""

from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from m2_encoder.errors import UserError
from m2_encoder.runs.ranks import end_together, translate_memory_error, watching

GONE = RuntimeError("[pair.cc:561] Connection closed by peer [127.0.0.1]:38795. GLHF!")


def make_trainer(*seconds: float, rank: int = 0, reads: bool = True) -> Any:
    """A trainer that has started processes which end after so long."""
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), num_processes=1 + len(seconds), num_nodes=1)
    launcher.procs = [subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({s})"]) for s in seconds]
    return SimpleNamespace(
        strategy=SimpleNamespace(launcher=launcher),
        global_rank=rank,
        is_global_zero=rank == 0,
        train_dataloader=object() if reads else None,
    )


def returncodes(trainer: Any) -> list[int]:
    return [each.wait(timeout=10) for each in trainer.strategy.launcher.procs]


def test_others_are_ended_when_this_rank_has_the_cause(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(60, 60)
    assert end_together(trainer, UserError("bad data")) is None
    assert returncodes(trainer) == [-9, -9]
    assert capsys.readouterr().err == "", "the command says it"


def test_a_rank_that_ended_first_may_say_why(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(0.2, 60)
    started = time.monotonic()
    other = end_together(trainer, GONE)
    assert time.monotonic() - started < 4
    assert returncodes(trainer) == [0, -9]
    said = "another rank has ended; what it said stands above or in its own log. The run ends; run.resume=auto goes on"
    assert str(other).startswith(said)


@pytest.mark.parametrize(("reads", "said"), [(True, "m2-train: rank 3: bad data, twice\n"), (False, "")])
def test_a_later_rank_speaks_of_its_own_data_only(reads: bool, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert end_together(make_trainer(rank=3, reads=reads), UserError("bad data,\ntwice")) is None
    assert capsys.readouterr().err == said


def test_a_lack_of_memory_is_told_by_whichever_rank_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(rank=1, reads=False)
    trainer.world_size = 2
    said = r"^there is not enough memory \(cannot allocate 8 GB\); give a smaller data\."
    with pytest.raises(UserError, match=said), watching(trainer):
        raise MemoryError("Caught MemoryError\n  in a worker\ncannot allocate 8 GB")
    assert capsys.readouterr().err.startswith("m2-train: rank 1: there is not enough memory (cannot allocate 8 GB)")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_lack_of_memory_by_its_names(error: Exception) -> None:
    assert "strategy.micro_batches" in str(translate_memory_error(error))
    assert translate_memory_error(RuntimeError("shapes do not fit")) is None


def test_other_errors_stay_what_they_are() -> None:
    assert end_together(make_trainer(), RuntimeError("out of memory")) is None
    assert end_together(make_trainer(), UserError("a remote: Broken pipe")) is None
