"""Somebody else's model under every strategy: the same losses as in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.own_parts import write_own_parts

pytestmark = pytest.mark.slow

STRATEGIES = {
    "single": ("strategy=single",),
    "pieces": ("strategy=single", "strategy.micro_batches=4"),
    "ddp": ("strategy=ddp", "trainer.devices=2"),
    "grouped_ddp": ("strategy=grouped_ddp", "trainer.devices=2", "strategy.micro_batches=2"),
    "grouped_fsdp": ("strategy=grouped_fsdp", "trainer.devices=2"),
}


def train(own: Path, folder: Path, name: str, *lines: str, steps: int = 3) -> list[float]:
    """Losses of a run by step."""
    data = ("data=pairs", "data.train._target_=my_parts_of_mine.Pairs", "data.global_batch_size=8")
    given = ("model=towers", "+experiment=two_steps", "scheduler.warmup_steps=1", f"trainer.max_steps={steps}", *data)
    command = [sys.executable, "-m", "m2_encoder.cli.train", "--config-dir", str(own), *given, *lines]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    place = [f"run.folder={folder}", f"run.name={name}"]
    done = subprocess.run([*command, *place], env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [record["train/loss/itc"] for record in records if "train/loss/itc" in record]


def test_losses_are_those_of_one_process(tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo_root)
    own = write_own_parts(tmp_path / "parts")
    losses = {name: train(own, tmp_path, name, *lines) for name, lines in STRATEGIES.items()}
    assert len(losses["single"]) == 3
    for name, found in losses.items():
        assert found == pytest.approx(losses["single"], rel=1e-4), name


def test_a_run_goes_on_under_another_strategy(tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo_root)
    own = write_own_parts(tmp_path / "parts")
    whole = train(own, tmp_path, "whole", *STRATEGIES["single"])
    train(own, tmp_path, "parts-of", *STRATEGIES["grouped_fsdp"], steps=2)
    found = train(own, tmp_path, "parts-of", *STRATEGIES["grouped_ddp"], "run.resume=must")
    assert found == pytest.approx(whole, rel=1e-4)
