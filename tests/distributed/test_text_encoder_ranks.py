"""Another text encoder, taught by the start's: from one command, on one rank or two, with or without kept outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.pictures import export_small
from tests.support.shards import write_numbers

pytest.importorskip("sentence_transformers")

from tests.support.sentence_folder import write_sentence_encoder

pytestmark = pytest.mark.slow

RUNS = {
    "single": ("strategy=single",),
    "not kept": ("strategy=single", "model.cached_rows=0"),
    "grouped_ddp": ("strategy=grouped_ddp", "trainer.devices=2", "strategy.micro_batches=2"),
}


def test_ranks_pieces_and_kept_outputs_change_nothing(
    tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repo_root)
    folder = write_sentence_encoder(tmp_path / "sentences")
    start = export_small(tmp_path / "start")
    (tmp_path / "tars").mkdir()
    write_numbers(tmp_path / "tars", [24])
    data = (
        "data.check=null",
        "data.num_workers=0",
        "data.lanes=8",
        "data.global_batch_size=8",
        "data.transform.flip=0",
    )
    data += (f"data.sources.main.shards={tmp_path / 'tars'}", f"data.validation.mine={tmp_path / 'tars'}")
    given = (f"model.text.folder={folder}", f"model.image.model={start}", "model.image_size=32", "evaluation=[]")
    steps = ("trainer.max_steps=4", "trainer.val_check_interval=4", "scheduler.warmup_steps=1")
    steps += ("trainer.log_every_n_steps=1", "trainer.accelerator=cpu", "logger=csv")
    steps += ("objective.itc.schedule=[[0,0],[1,0],[2,1]]", "objective.distillation.schedule=[[0,1],[1,1],[2,0.1]]")
    found = {}
    for name, lines in RUNS.items():
        place = (f"run.folder={tmp_path}", f"run.name={name.replace(' ', '_')}", "run.final=last")
        command = [sys.executable, "-m", "m2_encoder.cli.train", "+experiment=text_encoder"]
        done = subprocess.run(
            [*command, *data, *given, *steps, *place, *lines],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        run = tmp_path / name.replace(" ", "_")
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found[name] = {
            loss: [each[f"train/loss/{loss}"] for each in records if f"train/loss/{loss}" in each]
            for loss in ("distillation", "itc")
        }
    assert [len(losses) for losses in found["single"].values()] == [4, 2], (
        "the first steps learn from the teacher alone"
    )
    for name, losses in found.items():
        for loss, values in losses.items():
            assert values == pytest.approx(found["single"][loss], rel=1e-4), (name, loss)
    weights, locked = (
        load_file(tmp_path / "single" / "export" / "model.safetensors"),
        load_file(start / "model.safetensors"),
    )
    for name, value in locked.items():
        assert torch.equal(weights[f"image.encoder.{name}"], value), name
    other = load_file(tmp_path / "grouped_ddp" / "export" / "model.safetensors")
    for name, value in weights.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)
        assert torch.equal(other[name], value) or name.startswith(("text_proj.", "logit_scale")), name
