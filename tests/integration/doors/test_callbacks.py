"""Callbacks by name in whole runs: a run that was stopped early, the best checkpoint, labels, and states of others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import m2_encoder
from m2_encoder.cli.commands import EXPORT
from m2_encoder.runs.folder import read_config
from tests.integration.doors.conftest import Own, Train

STOPS = (
    "callbacks=[default,early_stopping,best_checkpoint,lr_monitor,model_summary]", "trainer.limit_val_batches=1",
    "trainer.max_steps=4", "evaluation=[]", "run.final=best",
)  # fmt: skip
THRESHOLD = "callbacks.early_stopping.stopping_threshold"  # every recall is above -1

PARTS = """
    import lightning


    class Counts(lightning.Callback):
        def state_dict(self):
            return {"one": 1}
"""


def read_summary(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "summary.json").read_text(encoding="utf-8")))


@pytest.mark.slow
def test_a_run_that_was_stopped_early_is_finished(m2_train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ("run.task=ablation", "run.tags=[short,cpu]", "run.notes=a note")
    run = m2_train(*STOPS, *labels, f"{THRESHOLD}=-1.0")
    said = capsys.readouterr().out
    assert "model.backbone.vision_expert" in said
    assert "run mine: ablation · short, cpu · a note" in said
    assert "steps        2 of 4, finished early (early stopping: val/emoji_val/mean_recall=" in said
    assert "best         step 2: val/emoji_val/mean_recall" in said
    summary = read_summary(run)
    assert (summary["finished"], summary["steps"], summary["evaluated_step"]) == (True, 2, 2)
    assert summary["ended_by"].startswith("early stopping: val/emoji_val/mean_recall=")
    assert summary["best_checkpoint"]["file"] == "checkpoints/best.ckpt"
    assert (summary["task"], summary["tags"], summary["notes"]) == ("ablation", ["short", "cpu"], "a note")
    assert read_config(run / "config.yaml")["run"]["tags"] == ["short", "cpu"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all({"train/lr", "lr/decayed", "lr/plain", "lr/scales"} <= line.keys() for line in lines)
    assert lines[0]["train/lr"] == read_config(run / "config.yaml")["optimizer"]["lr"]

    before = (run / "metrics.jsonl").read_bytes(), (run / "config.yaml").read_bytes()
    m2_train(*STOPS, *labels, f"{THRESHOLD}=-1.0", "run.resume=auto")
    assert "run mine: ended at step 2 of 4 by early stopping: " in capsys.readouterr().out
    assert before == ((run / "metrics.jsonl").read_bytes(), (run / "config.yaml").read_bytes())
    assert read_summary(run)["steps"] == 2
    m2_train(*STOPS, f"{THRESHOLD}=-1.0", "run.resume=auto", "objective.itc.label_smoothing=0.1", code=2)
    assert "changes nothing, as training was stopped early at step 2" in capsys.readouterr().err
    m2_train(*STOPS, "run.resume=auto")
    assert "continuing at step 2 of 4" in capsys.readouterr().out
    assert read_summary(run)["steps"] == 4


@pytest.mark.slow
def test_two_ranks_stop_at_the_same_step(tmp_path: Path, emoji_folder: Path, repo_root: Path) -> None:
    places = (f"run.folder={tmp_path}", f"data.folder={emoji_folder}", "run.name=two", "trainer.val_check_interval=2")
    ranks = ("strategy=grouped_ddp", "trainer.devices=2", "trainer.accelerator=cpu", "scheduler.warmup_steps=1")
    command = [sys.executable, "-m", "m2_encoder.cli.train", "+experiment=smoke", *STOPS, *places, *ranks]
    done = subprocess.run([*command, f"{THRESHOLD}=-1.0"], cwd=repo_root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "steps        2 of 4, finished early (early stopping: val/emoji_val/mean_recall=" in done.stdout
    assert read_summary(tmp_path / "two")["steps"] == 2
    done = subprocess.run([*command, "run.resume=auto"], cwd=repo_root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert read_summary(tmp_path / "two")["steps"] == 4


def test_the_best_weights_are_exported(m2_train: Train) -> None:
    """Of a metric that only falls, the first value stays the best."""
    best = ("callbacks=[default,best_checkpoint]", "callbacks.best_checkpoint.monitor=train/lr")
    steps = ("trainer.val_check_interval=1", "trainer.max_steps=3", "scheduler.warmup_steps=0", "evaluation=[]")
    run = m2_train(*best, *steps, "trainer.limit_val_batches=1", "run.final=best")
    assert read_summary(run)["evaluated_step"] == 1
    saved = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert saved["global_step"] == 1
    exported = m2_encoder.load(run / "export").model.state_dict()
    assert all(torch.equal(value, saved["state_dict"][f"model.{name}"]) for name, value in exported.items())
    assert "- steps · 步数: 3; the weights are those of step 1, the best" in (run / "export" / "README.md").read_text()
    assert m2_encoder.load(run, checkpoint="best").model is not None


@pytest.mark.slow
def test_the_moving_average_is_exported(m2_train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """At the end by choice, also of a run that ended before, and from a checkpoint."""
    given = ("callbacks=[default,ema]", "callbacks.ema.decay=0.5", "trainer.max_steps=3", "scheduler.warmup_steps=0")
    given += ("evaluation=[]", "optimizer.layer_decay=0.8")
    run = m2_train(*given, "run.final=ema")
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    average = saved["average"]["weights"]
    changed = [name for name, value in average.items() if not torch.equal(value, saved["state_dict"][name])]
    assert len(changed) > 20
    expected = saved["state_dict"] | average
    for model in (m2_encoder.load(run / "export").model, m2_encoder.load(run, checkpoint="last").model):
        assert all(torch.equal(value, expected[f"model.{name}"]) for name, value in model.state_dict().items())
    assert "- steps: 3; the weights are a moving average" in (run / "export" / "README.md").read_text()
    assert read_summary(run)["evaluated_weights"] == "average"
    assert "weights      the moving average, of step 3" in capsys.readouterr().out
    m2_train(*given, "run.resume=auto", "run.final=last")
    plain = m2_encoder.load(run / "export").model.state_dict()
    assert all(torch.equal(value, saved["state_dict"][f"model.{name}"]) for name, value in plain.items())
    assert "evaluated_weights" not in read_summary(run)
    m2_train(*given, "run.resume=auto", "run.final=ema")
    again = m2_encoder.load(run / "export").model.state_dict()
    assert all(torch.equal(value, expected[f"model.{name}"]) for name, value in again.items())


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("run.final=ema",), "run.final=ema: needs a callback that keeps an average of the weights; use callbacks="),
        (("optimizer.layer_decay=1.5",), "optimizer.layer_decay=1.5: must be a number, above 0 and at most 1"),
        (("callbacks=[default,ema]", "callbacks.ema.decay=1"), "callbacks.ema.decay=1: must be a number"),
        (
            ("callbacks=[default,early_stopping]", "callbacks.early_stopping.monitor=val/emoji_val_zh/recall"),
            "callbacks.early_stopping.monitor=val/emoji_val_zh/recall: is no metric of this run; the metrics are "
            "val/emoji_val_zh/mean_recall, ",
        ),
        (
            ("+callbacks.mine={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss}",),
            "callbacks.mine.monitor=val/loss: is no metric of this run; the metrics are val/emoji_val",
        ),
        (("run.final=best",), "run.final=best: needs a callback that chooses it; use callbacks=[default,best_che"),
        (("run.keep_last=0",), "run.keep_last=0: must be a whole number, 1 or more"),
        (
            ("run.keep_last=null", "run.keep_every=4"),
            "run.keep_every=4: changes nothing where run.keep_last=null keeps all checkpoints",
        ),
        (("run.tags=short",), "run.tags=short: must be a list of texts"),
        (
            ("callbacks=[best_checkpoint]",),
            "callbacks.best_checkpoint: needs callbacks.checkpoint, which writes the file",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    m2_train: Train, capsys: pytest.CaptureFixture[str], lines: tuple[str, ...], said: str
) -> None:
    run = m2_train("trainer.limit_val_batches=1", *lines, code=2)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"m2-train: {said}")
    assert len(line) <= 500
    assert not (run / "metrics.jsonl").exists()


def test_early_stopping_without_validation_is_refused(m2_train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    m2_train("callbacks=[default,early_stopping]", code=2)
    said = "callbacks.early_stopping: decides by validations, and trainer.limit_val_batches=0 leaves none"
    assert said in capsys.readouterr().err


def test_a_run_with_parts_that_are_gone_is_exported(
    own: Own, m2_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.write("kept_parts.py", PARTS)
    run = m2_train("+callbacks.a={_target_: kept_parts.Counts}", "evaluation=[]", "run.export=false")
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["Counts"] == {"one": 1}
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(own.folder)])
    monkeypatch.delitem(sys.modules, "kept_parts")
    monkeypatch.setattr(sys, "argv", ["m2-export", f"run.folder={tmp_path / 'outputs'}", "run.name=mine"])
    assert EXPORT() == 0
    assert m2_encoder.load(run).model is not None
    assert m2_encoder.load(run, checkpoint="last").model is not None
