"""From folders of classes and trained weights to a better model, by the commands that the documents name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import m2_encoder
from m2_encoder.cli import data, train
from tests.support.suites import draw

CALLBACKS = "callbacks=[default,early_stopping,best_checkpoint,ema]"


@pytest.mark.slow
def test_weights_learn_classes_until_their_own_split_gets_no_better(
    emoji_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Early stopping, the best checkpoint and the average, from `model.weights`, on tars of `m2-data split`."""
    photos = tmp_path / "photos"
    for number in range(60):
        place = photos / ("cat" if number < 30 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        draw(number).resize((20 + number % 7, 24 + number % 5)).save(place / f"{number}.png")
    for line in (
        f"pack source={photos} classes=folders output={tmp_path / 'tars'} workers=0",
        f"split source={tmp_path / 'tars'} output={tmp_path / 'sides'} val=0.25 by=picture near_images=null workers=0",
    ):
        monkeypatch.setattr(sys, "argv", ["m2-data", *line.split()])
        assert data.main() == 0

    def m2_train(name: str, *lines: str) -> Path:
        given = ("+experiment=smoke", f"run.folder={tmp_path}", f"run.name={name}", "scheduler.warmup_steps=0", *lines)
        monkeypatch.setattr(sys, "argv", ["m2-train", *given])
        assert train.main() == 0
        return tmp_path / name

    few = ("trainer.max_steps=2", "trainer.limit_val_batches=0", "evaluation=[]", f"data.folder={emoji_folder}")
    first = m2_train("first", *few)
    scale = m2_encoder.load(first / "export").model.logit_scale.detach().exp()
    capsys.readouterr()
    run = m2_train(
        "second", "data=webdataset", f"data.sources.main.shards={tmp_path / 'sides' / 'train'}",
        f"+data.validation.mine={tmp_path / 'sides' / 'val'}", f"model.weights={first / 'export'}",
        CALLBACKS, "run.final=best", "callbacks.ema.decay=0.5", "callbacks.early_stopping.patience=2",
        "callbacks.early_stopping.stopping_threshold=-1", "trainer.limit_val_batches=1.0", "trainer.max_steps=6",
        "trainer.val_check_interval=1", "data.global_batch_size=8", "data.lanes=32", "data.num_workers=0",
        "evaluation=[retrieval]",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert f"(a scale of {float(scale):.3g})" in said
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["ended_by"].startswith("early stopping: val/mine/mean_recall=")
    assert (summary["steps"], summary["evaluated_step"], summary["evaluated_weights"]) == (1, 1, "average")
    saved = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    expected = saved["state_dict"] | saved["average"]["weights"]
    model = m2_encoder.load(run / "export").model
    assert all(torch.equal(value, expected[f"model.{name}"]) for name, value in model.state_dict().items())
    assert summary["metrics"]["val/mine_en/mean_recall"] == pytest.approx(summary["best_checkpoint"]["value"], abs=1e-3)
