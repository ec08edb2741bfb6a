"""Counts of unusable samples in metrics, over resumed parts of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.data.webdataset_module import WebDatasetModule
from m2_encoder.runs.lightning_loggers import JsonlLogger
from m2_encoder.training.callbacks.checkpoint import RunCheckpoint
from m2_encoder.training.callbacks.skipped_samples import SkippedSamples
from tests.support.mixtures import make_mixture
from tests.support.training import LIGHTNING_WARNINGS, make_module, make_trainer

pytestmark = [
    *(pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*Total length of `list`.*"),
]


def train(
    folder: Path, shards: Path, *, max_steps: int, resume: bool = False
) -> tuple[dict[str, Any], WebDatasetModule]:
    module = make_module(max_steps=8)
    trainer = make_trainer(
        folder,
        max_steps=max_steps,
        callbacks=[SkippedSamples(every_n_steps=2), RunCheckpoint(folder=folder / "checkpoints", every_n_steps=4)],
        loggers=[JsonlLogger(folder / "metrics.jsonl")],
    )
    data = make_mixture(shards, max_steps=8)
    trainer.fit(
        module, datamodule=data, ckpt_path=folder / "checkpoints" / "last.ckpt" if resume else None, weights_only=True
    )
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    skipped = {k: v for record in records for k, v in record.items() if k.startswith("data/skipped/")}
    return skipped, data


def test_reasons_are_counted_in_metrics_and_listed_once(tmp_path: Path) -> None:
    whole, data = train(tmp_path / "whole", tmp_path / "shards", max_steps=8)
    counts = data.fault_log.counts + data.fault_log.at_start
    assert whole == {f"data/skipped/{reason}": count for reason, count in counts.items()}
    assert whole["data/skipped/undecodable_image"] >= 3
    assert whole["data/skipped/missing_caption"] == 1, "what headers tell is counted once, at the start"
    train(tmp_path / "parts", tmp_path / "shards", max_steps=4)
    resumed, _ = train(tmp_path / "parts", tmp_path / "shards", max_steps=8, resume=True)
    assert resumed == whole
    lists = [(tmp_path / name / "bad_samples.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    assert sorted(lists[0]) == sorted(lists[1])
    assert len({(json.loads(line)["shard"], json.loads(line)["key"]) for line in lists[0]}) == len(lists[0])
