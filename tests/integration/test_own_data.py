"""Doors of the data: a column of a batch and a source of one's own, from a folder outside of the package."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from m2_encoder.cli import train as train_command
from m2_encoder.runs.ending import Results
from tests.support.shards import make_sample, write_tar
from tests.support.training import LIGHTNING_WARNINGS

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

SMALL = (
    "+experiment=smoke", "scheduler.warmup_steps=0", "data.global_batch_size=8", "model.image_size=16",
    "model.patch_size=8", "trainer.limit_val_batches=0", "run.export=false", "logger=csv",
)  # fmt: skip

COLUMNS = """
import json
import torch
from m2_encoder.data.samples.sample import Column
from m2_encoder.objectives.base import Objective, ObjectiveOutput


class Score(Column):
    def read(self, sample):
        return sample.text.metadata["score"]


class Depth(Column):
    files = ("depth.bin",)

    def read(self, sample):
        return list(sample.files["depth.bin"])


class Length(Column):
    per_caption = True

    def read(self, sample):
        return [len(caption.text) for caption in sample.captions]


class Scored(Objective):
    def __init__(self, *, log, weight=1.0, schedule=None):
        super().__init__(weight=weight, schedule=schedule)
        self.log = log

    def forward(self, inputs):
        extra = inputs.batch.extra
        per_image = len(inputs.text_features) // len(inputs.image_features)
        images = inputs.image_features.repeat_interleave(per_image, dim=0)
        losses = extra["score"].repeat_interleave(per_image) * (1 - (images * inputs.text_features).sum(dim=1))
        with open(self.log, "a") as file:
            columns = {name: values.tolist() for name, values in extra.items()}
            print(json.dumps([inputs.step, inputs.batch.keys, columns]), file=file)
        return ObjectiveOutput(loss=losses.mean(), per_sample=losses.detach())
"""

SOURCE = """
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.types import ImageTextBatch


class Noise(LightningDataModule):
    validation_name = "noise"

    def __init__(self, *, tokenizer, image_size, seed, max_steps, global_batch_size, masking=None):
        super().__init__()
        self.tokenizer, self.size, self.steps, self.rows = tokenizer, image_size, max_steps, global_batch_size

    def train_dataloader(self):
        return DataLoader(range(self.steps), batch_size=None, collate_fn=self.batch)

    def batch(self, step):
        images = torch.randint(256, (self.rows, 3, self.size, self.size), dtype=torch.uint8)
        names = tuple(str(row) for row in range(self.rows))
        zeros = torch.zeros(self.rows, dtype=torch.int64)
        identity, sources = torch.arange(self.rows), ("noise",) * self.rows
        return ImageTextBatch(images, self.tokenizer(names), zeros, identity, names, sources)

    def val_dataloader(self):
        return []

    def retrieval_sets(self):
        batch = self.batch(0)
        return {"noise": RetrievalSet("noise", batch.keys, batch.images, {"en": batch.keys, "zh": batch.keys})}
"""

Start = Callable[..., int]


@pytest.fixture
def start(repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """`m2-train` with the folder `own` beside the checkout's configuration."""
    for name, content in {
        "own_columns.py": COLUMNS,
        "own_source.py": SOURCE,
        "conf/objective/scored.yaml": "scored: {_target_: own_columns.Scored, weight: 1.0, log: none}",
        "conf/data/scored.yaml": """
            defaults: [webdataset, _self_]
            columns:
              score: {_target_: own_columns.Score}
              depth: {_target_: own_columns.Depth}
              length: {_target_: own_columns.Length}
        """,
        "conf/data/mine.yaml": "{_target_: own_source.Noise, global_batch_size: 8}",
    }.items():
        path = tmp_path / "own" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(content), encoding="utf-8")
    monkeypatch.chdir(repo_root)
    monkeypatch.syspath_prepend(tmp_path / "own")
    monkeypatch.setattr("m2_encoder.runs.run.report_run", lambda *_, **__: Results({}, (), tmp_path, 1))

    def run(*lines: str) -> int:
        own = ("--config-dir", str(tmp_path / "own" / "conf"), f"run.folder={tmp_path / 'outputs'}")
        monkeypatch.setattr(sys, "argv", ["m2-train", *own, *SMALL, *lines])
        return train_command.main()

    return run


def _write_scored(folder: Path, count: int) -> None:
    members = []
    for i in range(count):
        captions = {"en": [f"number {i}"], "zh": [f"数字 {i}"]}
        sample = make_sample(f"{i:03d}", i, metadata={"captions": captions, "score": i / 10})
        members += [(f"{i:03d}.depth.bin", bytes([i, 7])), *sample]
    without = make_sample("none", count)
    write_tar(folder / "0.tar", [*members[: len(members) // 6 * 3], *without, *members[len(members) // 6 * 3 :]])


def test_a_column_reaches_an_own_objective_and_is_the_same_after_a_resume(start: Start, tmp_path: Path) -> None:
    _write_scored(tmp_path / "tars", 24)
    log = tmp_path / "log.jsonl"
    lines = (
        "data=scored", "data.captions.every_language=true", "objective=[itc,scored]", f"objective.scored.log={log}",
        f"data.sources.main.shards={tmp_path / 'tars'}", "data.max_bad_share=1", "data.num_workers=1", "data.lanes=1",
        "strategy.micro_batches=2", "run.resume=auto",
    )  # fmt: skip
    assert start(*lines, "trainer.max_steps=4", "run.name=whole") == 0
    assert start(*lines, "trainer.max_steps=2", "run.name=parts") == 0
    assert start(*lines, "trainer.max_steps=4", "run.name=parts") == 0
    found = [json.loads(line) for line in log.read_text().splitlines()]
    assert found[:4] == found[4:], "two runs, the second one resumed"
    seen = set()
    for _, keys, extra in found[:4]:
        assert extra["score"] == pytest.approx([int(key) / 10 for key in keys])
        assert extra["depth"] == [[int(key), 7] for key in keys]
        assert extra["length"] == [len(text) for key in keys for text in (f"number {int(key)}", f"数字 {int(key)}")]
        seen |= set(keys)
    assert len(seen) == 24, "all that have a score, and not the one without"
    listed = (tmp_path / "outputs" / "whole" / "bad_samples.jsonl").read_text()
    assert "column score: KeyError: 'score'" in listed


def test_a_source_of_ones_own_trains(start: Start, tmp_path: Path) -> None:
    assert start("data=mine", "trainer.max_steps=3", "run.name=mine") == 0
    lines = (tmp_path / "outputs" / "mine" / "metrics.jsonl").read_text().splitlines()
    assert sum("train/loss/itc" in line for line in lines) == 3
