"""Two real processes under Lightning's DDP train as one process does, from the data to the log."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from m2_encoder.runs.lightning_loggers import JsonlLogger
from m2_encoder.strategies.grouped_ddp import GroupedDDPStrategy
from m2_encoder.training.callbacks.checkpoint import RunCheckpoint
from m2_encoder.training.callbacks.throughput import Throughput
from tests.support.ranks import run_lightning_ranks
from tests.support.training import LIGHTNING_WARNINGS, make_captions, make_datamodule, make_module, make_trainer

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

STEPS = 3
# 721 validation items: rank 0 has two chunks, rank 1 one. Ranks that wait for each other there would hang.
EVAL_BATCH_SIZE = 360


def train(rank: int, world_size: int, emoji_folder: str, folder: str) -> dict[str, Any]:
    """A short run; what this rank ends with."""
    warnings.simplefilter("ignore")
    lightning.seed_everything(3, workers=True, verbose=False)
    module = make_module(max_steps=STEPS)
    strategy = GroupedDDPStrategy()
    many: dict[str, Any] = {"strategy": strategy, "devices": world_size, "plugins": [LightningEnvironment()]}
    trainer = make_trainer(
        Path(folder),
        max_steps=STEPS,
        callbacks=[Throughput(), RunCheckpoint(folder=Path(folder) / "checkpoints", every_n_steps=2)],
        loggers=[JsonlLogger(Path(folder) / "metrics.jsonl")],
        limit_val_batches=1.0,
        val_check_interval=STEPS,
        **(many if world_size > 1 else {}),
    )
    datamodule = make_datamodule(
        Path(emoji_folder),
        max_steps=STEPS,
        eval_batch_size=EVAL_BATCH_SIZE,
        captions=make_captions(every_language=True),
    )
    trainer.fit(module, datamodule=datamodule)
    losses = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/loss")}
    weights = {name: value.numpy() for name, value in module.model.state_dict().items()}
    return {"losses": losses, "weights": weights, "draw": float(torch.rand(()))}


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines]


def test_two_ranks_train_as_one(emoji_folder: Path, tmp_path: Path) -> None:
    two = run_lightning_ranks(train, 2, 2, str(emoji_folder), str(tmp_path / "two"))
    one = train(0, 1, str(emoji_folder), str(tmp_path / "one"))

    assert two[0]["losses"] == two[1]["losses"], "the loss that is logged is the mean over ranks, on each of them"
    for name, weights in two[0]["weights"].items():
        np.testing.assert_array_equal(weights, two[1]["weights"][name], err_msg=name)
        # Adam's first steps divide by the gradient's own size, which makes much of fp32 rounding.
        np.testing.assert_allclose(weights, one["weights"][name], rtol=0, atol=2e-4, err_msg=name)

    ours, expected = records(tmp_path / "two"), records(tmp_path / "one")
    assert [record["step"] for record in ours] == [1, 2, 3]
    assert [record["samples_seen"] for record in ours] == [32, 64, 96]
    for record, reference in zip(ours, expected, strict=True):
        assert record.keys() == reference.keys()
        for name, value in record.items():
            if name.startswith("val/"):  # one of 721 items more or less
                assert value == pytest.approx(reference[name], abs=0.6), name
            else:
                assert value == pytest.approx(reference[name], rel=1e-3), name
    assert "val/emoji_val_zh/mean_recall" in ours[-1]

    state = torch.load(tmp_path / "two" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == STEPS
    assert len(state["random_states"]) == 2
    (loader,) = state["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert loader["position"] == STEPS * 32
