"""Runs that are interrupted: what they trained on, row by row, and what they end with."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.parallelize import gather_model
from m2_encoder.strategies.grouped_ddp import GroupedDDPStrategy
from m2_encoder.strategies.grouped_fsdp import GroupedFSDPStrategy
from m2_encoder.strategies.single import LocalStrategy
from m2_encoder.training.callbacks.checkpoint import RunCheckpoint
from m2_encoder.training.callbacks.skipped_samples import SkippedSamples
from m2_encoder.training.module import PretrainModule
from m2_encoder.types import ImageTextBatch
from tests.support.mixtures import make_mixture
from tests.support.training import make_module, make_trainer, tiny_config

STRATEGIES = {"one": partial(LocalStrategy, "cpu"), "ddp": GroupedDDPStrategy, "fsdp": GroupedFSDPStrategy}


def digest_rows(batch: ImageTextBatch) -> list[str]:
    """Everything that a model sees of each row, in a word that begins with the row's source and key."""
    texts = len(batch.text.ids) // len(batch.keys)
    rows = []
    for row, (key, source) in enumerate(zip(batch.keys, batch.sources, strict=True)):
        digest = hashlib.sha256(batch.images[row].contiguous().numpy().tobytes())
        digest.update(int(batch.identity[row]).to_bytes(8, "big"))
        for text in range(row * texts, (row + 1) * texts):
            ids = batch.text.ids[text][batch.text.mask[text]]  # without the padding, which depends on the neighbours
            digest.update(ids.numpy().tobytes() + bytes([int(batch.language[text])]))
        rows.append(f"{source}/{key}/{digest.hexdigest()[:16]}")
    return rows


class RowRecorder(Callback):
    """Writes the rows of every step to a file of its rank, a line per step; a killed run leaves the lines it wrote."""

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(folder)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        line = {"step": trainer.global_step - 1, "world": trainer.world_size, "rows": digest_rows(batch)}
        with (self._folder / f"rank{trainer.global_rank}.jsonl").open("ab") as file:
            file.write(b"\n" + json.dumps(line).encode())


def read_rows(folder: Path) -> dict[int, list[list[str]]]:
    """The global batches that were trained on, by step; a step that was trained several times has several."""
    parts: dict[tuple[int, int], dict[int, list[list[str]]]] = {}
    for path in sorted(folder.glob("rank*.jsonl")):
        rank = int(path.stem.removeprefix("rank"))
        for text in path.read_bytes().split(b"\n"):
            try:
                line = json.loads(text)
            except ValueError:  # cut in half by a kill
                continue
            parts.setdefault((line["step"], line["world"]), {}).setdefault(rank, []).append(line["rows"])
    batches: dict[int, list[list[str]]] = {}
    for (step, world), ranks in parts.items():
        for times in range(max(map(len, ranks.values()))):
            own = [ranks.get(rank, [])[times : times + 1] for rank in range(world)]
            if all(own):  # a kill may hit one rank before it wrote what another one did
                batches.setdefault(step, []).append(
                    [rows for group in zip(*(o[0] for o in own), strict=True) for rows in group]
                )
    return batches


class Terminated(Callback):
    """Sends one rank the signal of a scheduler that wants the machine back, in the middle of a step."""

    def __init__(self, *, step: int, rank: int) -> None:
        self._step, self._rank = step, rank

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        if (trainer.global_step, trainer.global_rank) == (self._step - 1, self._rank):
            os.kill(os.getpid(), signal.SIGTERM)


def fit(
    folder: Path,
    shards: Path,
    *,
    strategy: str = "one",
    world_size: int = 1,
    steps: int,
    stop: int | None = None,
    terminate: tuple[int, int] | None = None,
    resume: Path | None = None,
    drop_path_rate: float = 0.0,
    data: dict[str, Any] | None = None,
    **trainer_settings: Any,
) -> dict[str, Any]:
    """A run over a mixture, or a part of one.

    Args:
        folder: of this part.
        shards: of the mixture.
        strategy: one of `STRATEGIES`.
        world_size: ranks.
        steps: of the whole run.
        stop: step after which this part ends by itself; None goes on to the last one.
        terminate: (step, rank) that is sent SIGTERM.
        resume: checkpoint to go on from.
        drop_path_rate: with it, the random state of every rank matters.
        data: settings of the data module.
        **trainer_settings: of the trainer.

    Returns:
        `weights` (NumPy, on the first rank), `skipped` by reason, and `exit`, the code of a run that was terminated.
    """
    lightning.seed_everything(3, workers=True, verbose=False)
    module = make_module(
        max_steps=steps, model=tiny_config(num_layers=2, drop_path_rate=drop_path_rate), lr=2e-4, validation_name="val"
    )
    skipped = SkippedSamples(every_n_steps=2)
    many = {"devices": world_size, "plugins": [LightningEnvironment()]} if world_size > 1 else {}
    trainer = make_trainer(
        folder,
        max_steps=stop or steps,
        strategy=STRATEGIES[strategy](),
        callbacks=[
            RunCheckpoint(folder=folder / "checkpoints", every_n_steps=3),
            RowRecorder(folder / "rows"),
            skipped,
            *([Terminated(step=terminate[0], rank=terminate[1])] if terminate else []),
        ],
        **{**many, **trainer_settings},
    )
    code = None
    try:
        datamodule = make_mixture(shards, max_steps=steps, **(data or {}))
        trainer.fit(module, datamodule=datamodule, ckpt_path=resume, weights_only=True)
    except SIGTERMException as stop_:
        code = stop_.code
    weights = _gather_weights(module) if trainer.is_global_zero or strategy == "fsdp" else {}
    return {"weights": weights, "skipped": dict(skipped.totals), "exit": code, "step": trainer.global_step}


def _gather_weights(module: PretrainModule) -> dict[str, np.ndarray[Any, Any]]:
    """Whole ones, on the first rank."""
    assert isinstance(module.model, M2Encoder)
    model = gather_model(module.model)
    return {} if model is None else {name: value.numpy() for name, value in model.state_dict().items()}


def furthest(ours: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest difference of two sets of weights."""
    assert ours.keys() == expected.keys()
    assert ours, "no weights"
    return max(float(abs(ours[name] - expected[name]).max()) for name in expected)
