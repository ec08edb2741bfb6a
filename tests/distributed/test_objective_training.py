"""All further objectives at once in real Lightning runs of two ranks: DDP and FSDP2, whole or in recomputed pieces.

That two ranks equal one process is tested without Lightning (`test_objective_ranks`); here every way of running them
must end at the same weights, and no parameter may be left without a gradient, for which DDP would wait.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import numpy as np
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch.utils.data import DataLoader

from m2_encoder.distributed.gradients import whole_tensor
from m2_encoder.objectives.base import Objective
from m2_encoder.objectives.captioning import Captioning
from m2_encoder.objectives.contrastive import ImageTextContrastive
from m2_encoder.objectives.distillation import Distillation
from m2_encoder.objectives.long_captions import LongCaptions
from m2_encoder.objectives.masked_image import MaskedImage
from m2_encoder.objectives.masked_language import MaskedLanguage
from m2_encoder.objectives.matching import Matching
from m2_encoder.objectives.sigmoid import SigmoidContrastive
from m2_encoder.objectives.soft_targets import SoftTargetContrastive
from m2_encoder.objectives.text_contrast import TextContrast
from m2_encoder.strategies.grouped_ddp import GroupedDDPStrategy
from m2_encoder.strategies.grouped_fsdp import GroupedFSDPStrategy
from m2_encoder.types import ImageTextBatch, MaskedText, TextTokens
from tests.support.models import random_model
from tests.support.ranks import run_lightning_ranks
from tests.support.training import LIGHTNING_WARNINGS, make_module, make_trainer, tiny_config

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

RANKS, ROWS, CAPTIONS, STEPS = 2, 4, 2, 3
DDP, FSDP = GroupedDDPStrategy, GroupedFSDPStrategy
PIECES = {"micro_batches": 2, "recompute": True}


class Run(NamedTuple):
    """How to train; FSDP2 under Lightning has no fp64, and weights are drawn in the precision of the run."""

    kind: type[Any]
    options: dict[str, Any]
    precision: str


RUNS = {
    "ddp": Run(DDP, {}, "64-true"),
    "ddp in pieces": Run(DDP, PIECES, "64-true"),
    "ddp fp32": Run(DDP, {}, "32-true"),
    "fsdp in pieces": Run(FSDP, {**PIECES, "activation_checkpointing": True}, "32-true"),
    "fsdp in kept pieces": Run(FSDP, {"micro_batches": 4, "recompute": False}, "32-true"),
    "ddp bf16": Run(DDP, PIECES, "bf16-mixed"),
    "ddp, groups of one": Run(DDP, {"group_size": 1}, "32-true"),
    "fsdp, groups of one": Run(FSDP, {"group_size": 1, "micro_batches": 2}, "32-true"),
}


def build_objectives() -> dict[str, Objective]:
    torch.manual_seed(2)
    distillation = Distillation(teacher="none", feature_weight=0.5)
    distillation.teach_with(random_model(tiny_config(feature_dim=24), dtype=torch.float64))
    return {
        "itc": ImageTextContrastive(),
        "sigmoid": SigmoidContrastive(weight=0.1),
        "soft_targets": SoftTargetContrastive(),
        "text_contrast": TextContrast(weight=0.3),
        "long": LongCaptions(weight=0.3, components=2),
        "captioning": Captioning(weight=0.5),
        "cmlm": MaskedLanguage(weight=0.5),
        "cmim": MaskedImage(masking="attentive", mask_ratio=0.5),
        "matching": Matching(schedule={0: 0, 1: 1}),  # pauses in the first step
        "distillation": distillation,
    }


def make_rows(rank: int, step: int) -> ImageTextBatch:
    generator = torch.Generator().manual_seed(100 * step + rank)
    texts, length = ROWS * CAPTIONS, 8 - rank  # ranks pad to different lengths
    lengths = torch.randint(3, length + 1, (texts, 1), generator=generator)
    images = torch.randint(0, 256, (ROWS, 3, 16, 16), generator=generator, dtype=torch.uint8)
    ids, mask = torch.randint(5, 90, (texts, length), generator=generator), torch.arange(length) < lengths
    predicted = mask & (torch.rand(mask.shape, generator=generator) < 0.5)
    predicted &= rank != step  # a rank without any hidden word
    return ImageTextBatch(
        images=images,
        text=TextTokens(ids, mask),
        language=torch.arange(texts) % 2,
        identity=torch.randint(0, 6, (ROWS,), generator=generator),
        keys=("row",) * ROWS,
        sources=("test",) * ROWS,
        masked_text=MaskedText(ids.masked_fill(predicted, 4), predicted),
    )


def train(rank: int, run: Run, folder: str) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning.seed_everything(6, verbose=False)
        module = make_module(
            model=tiny_config(),
            max_steps=STEPS,
            objectives=build_objectives(),
            optimizer=lambda module: torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1),
            scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
        )
        trainer = make_trainer(
            Path(folder),
            max_steps=STEPS,
            precision=run.precision,
            strategy=run.kind(**run.options),
            devices=RANKS,
            plugins=[LightningEnvironment()],
        )
        batches: Any = [make_rows(rank, step) for step in range(STEPS)]
        trainer.fit(module, train_dataloaders=DataLoader(batches, batch_size=None))
    losses = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/loss")}
    weights = {name: whole_tensor(p.detach()).double().numpy() for name, p in module.named_parameters()}
    return {"weights": weights, "losses": losses}


def train_all(rank: int, folder: str) -> dict[str, dict[str, Any]]:
    return {name: train(rank, run, f"{folder}/{name}") for name, run in RUNS.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return run_lightning_ranks(train_all, RANKS, str(tmp_path_factory.mktemp("runs")))


@pytest.mark.parametrize(
    ("name", "reference", "tolerance"),
    [
        ("ddp in pieces", "ddp", 1e-11),
        ("fsdp in pieces", "ddp fp32", 1e-5),
        ("fsdp in kept pieces", "ddp fp32", 1e-5),
        ("fsdp, groups of one", "ddp, groups of one", 1e-5),
    ],
)
def test_every_way_of_running_ends_at_the_same_weights(
    results: list[dict[str, dict[str, Any]]], name: str, reference: str, tolerance: float
) -> None:
    expected = results[0][reference]
    assert {f"train/loss/{objective}" for objective in build_objectives()} <= expected["losses"].keys()
    for result in results:
        assert result[name]["losses"] == pytest.approx(expected["losses"], rel=1e-4, nan_ok=True)
        for key, weights in expected["weights"].items():
            np.testing.assert_allclose(result[name]["weights"][key], weights, rtol=0, atol=tolerance, err_msg=key)


def test_half_precision_stays_near_full(results: list[dict[str, dict[str, Any]]]) -> None:
    half, full = results[0]["ddp bf16"]["losses"], results[0]["ddp fp32"]["losses"]
    for name in build_objectives():
        assert half[f"train/loss/{name}"] == pytest.approx(full[f"train/loss/{name}"], rel=0.1), name
        assert half[f"train/loss/{name}"] != full[f"train/loss/{name}"]


def test_groups_see_fewer_negatives(results: list[dict[str, dict[str, Any]]]) -> None:
    whole, alone = results[0]["ddp fp32"]["losses"], results[0]["ddp, groups of one"]["losses"]
    for name in ("itc", "sigmoid", "soft_targets", "text_contrast", "matching", "distillation"):
        assert abs(whole[f"train/loss/{name}"] - alone[f"train/loss/{name}"]) > 1e-4, name
