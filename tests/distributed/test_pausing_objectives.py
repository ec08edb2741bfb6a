"""Objectives that pause in a schedule: what only they train stands still, the same under DDP and FSDP2, also resumed.

DDP waits for a gradient of every parameter; an optimizer takes a gradient of 0 for a reason to decay weights and to go
on with their momentum. FSDP2 waits for nobody, but saves no state of the optimizer for what never had a gradient.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import numpy.typing as npt
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch.utils.data import DataLoader

from m2_encoder.distributed.gradients import whole_tensor
from m2_encoder.objectives.base import Objective
from m2_encoder.objectives.contrastive import ImageTextContrastive
from m2_encoder.objectives.masked_image import MaskedImage
from m2_encoder.objectives.masked_language import MaskedLanguage
from m2_encoder.strategies.grouped_ddp import GroupedDDPStrategy
from m2_encoder.strategies.grouped_fsdp import GroupedFSDPStrategy
from m2_encoder.training.optim import OptimizerFactory, build_muon, build_optimizer
from m2_encoder.types import ImageTextBatch, MaskedText, TextTokens
from tests.support.ranks import run_lightning_ranks
from tests.support.training import LIGHTNING_WARNINGS, make_module, make_trainer, tiny_config

pytestmark = [pytest.mark.slow, *(pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS)]

RANKS, ROWS, STEPS, CUT = 2, 4, 5, 2
STRATEGIES = {"ddp": GroupedDDPStrategy, "fsdp": GroupedFSDPStrategy}
SCHEDULES: dict[str, dict[int, float]] = {
    "late": {0: 0, 2: 0, 3: 1},
    "early": {0: 1, 2: 0},
    "gap": {0: 1, 1: 0, 3: 0, 4: 1},
}
ADAMW = partial(build_optimizer, lr=1e-2, weight_decay=0.2)
MUON = partial(build_muon, lr=1e-2, matrix_lr=1e-2, weight_decay=0.0)  # its momentum alone moves matrices
Weights = dict[str, npt.NDArray[np.float64]]


def build_objectives(schedule: dict[int, float]) -> dict[str, Objective]:
    torch.manual_seed(2)
    return {
        "itc": ImageTextContrastive(),
        "cmlm": MaskedLanguage(text_expert=True, schedule=schedule),
        "cmim": MaskedImage(masking="attentive", mask_ratio=0.5, text_expert=True, schedule=schedule),
    }


def make_rows(rank: int, step: int) -> ImageTextBatch:
    generator = torch.Generator().manual_seed(100 * step + rank)
    ids, mask = torch.randint(5, 90, (ROWS, 8), generator=generator), torch.ones(ROWS, 8, dtype=torch.bool)
    predicted = torch.rand(mask.shape, generator=generator) < 0.5
    return ImageTextBatch(
        images=torch.randint(0, 256, (ROWS, 3, 16, 16), generator=generator, dtype=torch.uint8),
        text=TextTokens(ids, mask),
        language=torch.arange(ROWS) % 2,
        identity=torch.arange(ROWS) + ROWS * rank,
        keys=("row",) * ROWS,
        sources=("test",) * ROWS,
        masked_text=MaskedText(ids.masked_fill(predicted, 4), predicted),
    )


class Snapshots(lightning.Callback):
    """Weights after every step."""

    def __init__(self) -> None:
        self.weights: dict[int, Weights] = {}

    def on_train_batch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule, *_: Any) -> None:
        self.weights[trainer.global_step] = {
            name: whole_tensor(p.detach()).double().numpy().copy() for name, p in module.named_parameters()
        }


def train(
    rank: int,
    folder: str,
    schedule: dict[int, float],
    *,
    strategy: Any,
    optimizer: OptimizerFactory = ADAMW,
    first: int = 0,
    last: int = STEPS,
    checkpoint: str | None = None,
) -> dict[int, Weights]:
    """Train steps `first` to `last`, on from `checkpoint` if that is there, else saving it at the end."""
    snapshots = Snapshots()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning.seed_everything(6, verbose=False)
        module = make_module(
            model=tiny_config(),
            max_steps=STEPS,
            objectives=build_objectives(schedule),
            optimizer=optimizer,
            scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        )
        trainer = make_trainer(
            Path(folder),
            max_steps=last,
            precision="32-true",
            strategy=strategy,
            devices=RANKS,
            plugins=[LightningEnvironment()],
            callbacks=[snapshots],
        )
        # Lightning counts the batches of an unfinished epoch: those done before stand for themselves.
        batches: Any = [make_rows(rank, step) for step in range(first, last)] + [make_rows(rank, 0)] * first
        resumed = {"ckpt_path": checkpoint, "weights_only": True} if first else {}
        trainer.fit(module, train_dataloaders=DataLoader(batches, batch_size=None), **resumed)
        if checkpoint is not None and not first:
            trainer.save_checkpoint(checkpoint)
    return snapshots.weights


def train_all(rank: int, folder: str) -> dict[str, dict[int, Weights]]:
    runs = {}
    for name, schedule in SCHEDULES.items():
        for kind, strategy in STRATEGIES.items():
            runs[f"{name} {kind}"] = train(rank, f"{folder}/a", schedule, strategy=strategy())
    runs["muon"] = train(rank, f"{folder}/a", SCHEDULES["early"], strategy=GroupedDDPStrategy(), optimizer=MUON)
    for kind, strategy in STRATEGIES.items():
        saved = f"{folder}/{kind}.ckpt"
        train(rank, f"{folder}/a", SCHEDULES["late"], strategy=strategy(), last=CUT, checkpoint=saved)
    for saved in STRATEGIES:
        for kind, strategy in STRATEGIES.items():
            runs[f"{saved} to {kind}"] = train(
                rank,
                f"{folder}/a",
                SCHEDULES["late"],
                strategy=strategy(),
                first=CUT,
                checkpoint=f"{folder}/{saved}.ckpt",
            )
    return runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, Weights]]:
    return run_lightning_ranks(train_all, RANKS, str(tmp_path_factory.mktemp("runs")))[0]


def distance(left: Weights, right: Weights) -> float:
    return max(float(np.abs(left[name] - right[name]).max()) for name in left)


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddp_and_fsdp_end_at_the_same_weights(runs: dict[str, dict[int, Weights]], name: str) -> None:
    assert distance(runs[f"{name} ddp"][STEPS], runs[f"{name} fsdp"][STEPS]) < 1e-4  # a step is 1e-2


@pytest.mark.parametrize("run", ["early ddp", "early fsdp", "muon"])
def test_what_pauses_stands_still(runs: dict[str, dict[int, Weights]], run: str) -> None:
    weights = runs[run]
    still = [name for name in weights[STEPS] if np.array_equal(weights[2][name], weights[STEPS][name])]
    moved = [name for name in weights[STEPS] if name not in still]
    assert {name for name in still if name.startswith("objectives.")} == {
        name for name in weights[STEPS] if name.startswith("objectives.")
    }
    assert "model.image_embed.mask_token" in still
    assert any("text_expert" in name and name.endswith("fc1.weight") for name in still)
    assert any(name.startswith("model.") and name.endswith("q_proj.weight") for name in moved)
    assert not all(np.array_equal(weights[1][name], weights[2][name]) for name in still)


@pytest.mark.parametrize("kind", STRATEGIES)
@pytest.mark.parametrize("saved", STRATEGIES)
def test_a_run_saved_during_a_pause_goes_on(runs: dict[str, dict[int, Weights]], saved: str, kind: str) -> None:
    difference = distance(runs[f"{saved} to {kind}"][STEPS], runs[f"late {kind}"][STEPS])
    assert difference == 0 if saved == kind else difference < 1e-4
