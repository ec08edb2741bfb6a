"""Presets of sweeps, and sweeps that are changed when they go on; the jobs are functions."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.cli.commands import TRAIN
from m2_encoder.config.command import run_command
from m2_encoder.config.paths import default_run_folder

Start = Callable[..., int]

MINE = """\
# @package _global_
defaults:
  - /experiment: smoke
run:
  name: mine
hydra:
  mode: MULTIRUN
  sweeper:
    params:
      optimizer.lr: 1e-3,2e-3
      scheduler.warmup_steps: 2
"""


@pytest.fixture
def seen() -> list[dict[str, Any]]:
    """The configurations of the jobs that ran."""
    return []


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[dict[str, Any]]) -> Start:
    """Starts `m2-train` with a preset `mine`, and a function in place of the training."""
    (tmp_path / "own" / "sweep").mkdir(parents=True)
    (tmp_path / "own" / "sweep" / "mine.yaml").write_text(MINE, encoding="utf-8")

    def run(cfg: dict[str, Any]) -> None:
        seen.append(cfg)
        (default_run_folder(cfg) / "config.yaml").write_text(json.dumps(cfg), encoding="utf-8")

    def is_done(cfg: dict[str, Any]) -> bool:
        return (default_run_folder(cfg) / "config.yaml").exists()

    def begin(*argv: str) -> int:
        seen.clear()
        line = [*argv, "--config-dir", str(tmp_path / "own"), f"run.folder={tmp_path / 'runs'}"]
        monkeypatch.setattr(sys, "argv", ["m2-train", *line])
        bare = {"module": "", "measure": "", "end_sweep": "", "check_job": "", "check_late": ""}
        return run_command(dataclasses.replace(TRAIN, run=run, is_done=is_done, **bare), line)

    return begin


def _jobs(seen: list[dict[str, Any]]) -> dict[str, tuple[float, int]]:
    return {cfg["run"]["name"]: (cfg["optimizer"]["lr"], cfg["seed"]) for cfg in seen}


@pytest.mark.slow
def test_a_preset_of_ones_own_is_changed_and_goes_on(
    start: Start, seen: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("sweep=mine") == 0
    assert _jobs(seen) == {"mine-lr=0.001": (0.001, 0), "mine-lr=0.002": (0.002, 0)}
    assert {(cfg["data"]["global_batch_size"], cfg["scheduler"]["warmup_steps"]) for cfg in seen} == {(16, 2)}
    assert start("sweep=mine", "seed=1,0") == 0
    assert _jobs(seen) == {"mine-lr=0.001-seed=1": (0.001, 1), "mine-lr=0.002-seed=1": (0.002, 1)}
    assert "m2-train: 4/4 mine-lr=0.002: has finished before" in capsys.readouterr().err
    assert start("sweep=mine", "seed=0,1", "optimizer.lr=3e-3,2e-3") == 0
    assert list(_jobs(seen).values()) == [(0.003, 0), (0.003, 1)]
    records = {path.stem for path in (tmp_path / "runs" / "multirun" / "mine" / "jobs").glob("*.json")}
    assert len(records) == 6


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "sweep=mime",
            "sweep=mime: no such option (did you mean mine?); choose from emoji, mine, search, what_matters",
        ),
        ("+sweep=mine", "+sweep=mine: sweep is chosen already; leave out the +"),
        ("+experiment=emoji", "+experiment=emoji: experiment is chosen already; leave out the +"),
        ("run.resume=never", "run.name=mine-lr=0.001: "),
    ],
)
def test_what_is_refused(start: Start, capsys: pytest.CaptureFixture[str], line: str, said: str) -> None:
    if line.startswith("run.resume"):
        assert start("sweep=mine", "optimizer.lr=1e-3,2e-3") == 0
        capsys.readouterr()
    lines = [line] if line.lstrip("+").startswith("sweep") else ["sweep=mine", line]
    assert start(*lines) == 2
    err = capsys.readouterr().err
    assert (f"m2-train: {said}" if err.count("\n") == 1 else f"  {said}") in err


def test_the_experiment_of_a_preset_may_be_another(start: Start, seen: list[dict[str, Any]]) -> None:
    assert (
        start(
            "sweep=mine", "experiment=emoji", "seed=3", "optimizer.lr=1e-4", "scheduler.warmup_steps=${mul:2,${seed}}"
        )
        == 0
    )
    assert [cfg["scheduler"]["warmup_steps"] for cfg in seen] == [6]
    assert {cfg["data"]["global_batch_size"] for cfg in seen} == {128}
    assert _jobs(seen) == {"mine": (1e-4, 3)}


def test_the_shipped_preset_sees_as_many_samples_in_every_run(start: Start, seen: list[dict[str, Any]]) -> None:
    assert start("sweep=emoji", "seed=0", "optimizer.lr=1e-3") == 0
    sizes = [(cfg["data"]["global_batch_size"], cfg["trainer"]["max_steps"]) for cfg in seen]
    assert sizes == [(64, 128), (256, 32), (64, 128), (256, 32)]
    assert [cfg["run"]["name"] for cfg in seen][:2] == [
        "sweep-emoji-group_size=1-micro_batches=1",
        "sweep-emoji-group_size=1-micro_batches=4",
    ]
