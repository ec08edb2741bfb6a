"""The tables at the end of a sweep, of runs that were finished and trials that were pruned."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from m2_encoder.cli.sweep import report_sweep
from m2_encoder.config.sweep_jobs import JobOutcome

RECALL = "val/emoji_val_zh/mean_recall"


def _run(root: Path, lr: float, recall: float, *, pruned: bool = False, metric: str | None = None) -> JobOutcome:
    folder = root / f"s-lr={lr}"
    folder.mkdir()
    cfg = {"run": {"name": folder.name, "folder": str(root), "metric": metric}, "optimizer": {"lr": lr}}
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg | {"model": {}, "trainer": {}}), encoding="utf-8")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 2, RECALL: recall, "own": 5.0}) + "\n", encoding="utf-8")
    if not pruned:
        content = {"finished": True, "metrics": {RECALL: recall + 1, "val/emoji_heldout_zh/mean_recall": 3.0}}
        (folder / "summary.json").write_text(json.dumps(content), encoding="utf-8")
    state = "pruned" if pruned else "finished"
    return JobOutcome(folder.name, state, str(folder), swept=[f"optimizer.lr={lr}"])


def test_pruned_trials_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = [_run(tmp_path, 0.1, 1.0), _run(tmp_path, 0.2, 7.0, pruned=True), _run(tmp_path, 0.3, 2.0)]
    report_sweep(tmp_path, [*outcomes, JobOutcome("s-lr=0.4", "failed", reason="x")])
    rows = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert [(row["run"], row["state"], row["optimizer.lr"], row[RECALL]) for row in rows] == [
        ("s-lr=0.1", "finished", "0.1", "2.0"),
        ("s-lr=0.2", "pruned", "0.2", "7.0"),
        ("s-lr=0.3", "finished", "0.3", "3.0"),
    ]
    assert "s-lr=0.2  pruned" in capsys.readouterr().out
    assert (tmp_path / "sweep.png").is_file()


def test_the_metric_is_a_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report_sweep(tmp_path, [_run(tmp_path, 0.1, 1.0, metric="own"), _run(tmp_path, 0.2, 2.0, metric="own")])
    assert capsys.readouterr().out.split()[:3] == ["optimizer.lr", "runs", "own"]
    assert [row["own"] for row in csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines())] == ["5.0", "5.0"]
