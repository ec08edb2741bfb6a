"""Adaptations in real Lightning runs of two ranks, DDP and FSDP2: what is frozen does not move by a bit.

Frozen and trained parameters share groups of FSDP2's shards here. That two ranks equal one process is tested without
Lightning (`test_adaptation_ranks`); here every way of running them must end at the same weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import numpy as np
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch.utils.data import DataLoader

from m2_encoder.distributed.gradients import whole_tensor
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.objectives.contrastive import ImageTextContrastive
from m2_encoder.objectives.masked_language import MaskedLanguage
from m2_encoder.strategies.grouped_ddp import GroupedDDPStrategy
from m2_encoder.strategies.grouped_fsdp import GroupedFSDPStrategy
from m2_encoder.training.adaptation import Adaptation
from m2_encoder.training.adaptations.last import Last
from m2_encoder.training.adaptations.locked import Locked
from m2_encoder.training.adaptations.lora import Lora
from m2_encoder.training.optim import build_muon, build_optimizer
from tests.distributed.test_objective_training import make_rows
from tests.support.models import random_model
from tests.support.ranks import run_lightning_ranks
from tests.support.slow_parts import choose_parts, mark_parts
from tests.support.training import LIGHTNING_WARNINGS, make_module, make_trainer, tiny_config

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

RANKS, STEPS = 2, 2
DDP, FSDP = GroupedDDPStrategy, GroupedFSDPStrategy
CONFIG = tiny_config(num_layers=2)
ADAMW = partial(build_optimizer, lr=1e-2, weight_decay=0.5)
MUON = partial(build_muon, lr=1e-2, matrix_lr=1e-2, weight_decay=0.5)
PIECES = {"micro_batches": 2, "recompute": True, "activation_checkpointing": True}

BUILD: dict[str, Callable[[], Adaptation]] = {
    "locked": lambda: Locked(towers=["image"], layers=1),
    "lora": lambda: Lora(rank=3, first_layer=1, also=["logit_scale", "norms"]),
    "lora with dropout": lambda: Lora(rank=2, dropout=0.5),
    "last": lambda: Last(pull=20.0),
}


class Run(NamedTuple):
    """How to train."""

    adaptation: str
    strategy: type[Any]
    optimizer: Any = ADAMW
    options: dict[str, Any] = {}  # noqa: RUF012


RUNS = {
    "locked, ddp": Run("locked", DDP),
    "locked, fsdp": Run("locked", FSDP),
    "locked, muon, ddp": Run("locked", DDP, MUON),
    "lora, ddp": Run("lora", DDP),
    "lora, fsdp": Run("lora", FSDP),
    "lora, fsdp, pieces": Run("lora", FSDP, ADAMW, {**PIECES, "group_size": 2}),
    "lora with dropout, fsdp, pieces": Run("lora with dropout", FSDP, ADAMW, PIECES),
    "lora with dropout, ddp, pieces": Run("lora with dropout", DDP, ADAMW, PIECES),
    "last, ddp": Run("last", DDP),
    "last, fsdp": Run("last", FSDP, ADAMW, {"micro_batches": 2, "recompute": True}),
}
FEW = ("locked, ddp", "locked, fsdp", "lora, ddp", "lora, fsdp, pieces", "last, ddp", "last, fsdp")
"""Both strategies for each adaptation. The others are slow."""


def start() -> M2Encoder:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return random_model(CONFIG)


def train(rank: int, run: Run, folder: str) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning.seed_everything(6, verbose=False)
        module = make_module(
            model=CONFIG,
            max_steps=STEPS,
            objectives={"itc": ImageTextContrastive(), "cmlm": MaskedLanguage(weight=0.5)},
            optimizer=run.optimizer,
            adaptation=BUILD[run.adaptation](),
            initial_state=start().state_dict(),
        )
        trainer = make_trainer(
            Path(folder),
            max_steps=STEPS,
            strategy=run.strategy(**run.options),
            devices=RANKS,
            plugins=[LightningEnvironment()],
        )
        batches: Any = [make_rows(rank, step) for step in range(STEPS)]
        trainer.fit(module, train_dataloaders=DataLoader(batches, batch_size=None))
    parameters = dict(module.model.named_parameters())
    return {
        "weights": {name: whole_tensor(p.detach()).numpy() for name, p in parameters.items()},
        "trained": {name for name, p in parameters.items() if p.requires_grad},
    }


def train_all(rank: int, names: list[str], folder: str) -> dict[str, dict[str, Any]]:
    return {name: train(rank, RUNS[name], f"{folder}/{name}") for name in names}


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, dict[str, Any]]]:
    names = list(choose_parts(request, RUNS, FEW))
    return run_lightning_ranks(train_all, RANKS, names, str(tmp_path_factory.mktemp("runs")))


@pytest.mark.parametrize("name", mark_parts(RUNS, FEW))
def test_frozen_parameters_do_not_move_and_trained_ones_do(name: str, results: list[dict[str, dict[str, Any]]]) -> None:
    begun = {key: value.numpy() for key, value in start().state_dict().items()}
    for result in results:
        weights, trained = result[name]["weights"], result[name]["trained"]
        moved = {key for key in begun if not np.array_equal(weights[key], begun[key])}
        assert moved <= trained
        assert {key for key in trained & begun.keys() if not key.startswith("text_embed")} <= moved
        assert all(np.any(weights[key]) for key in trained if key.endswith("lora_B"))
        for key, value in results[0][name]["weights"].items():
            assert np.array_equal(value, weights[key]), "ranks differ"


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("locked, fsdp", "locked, ddp"),
        pytest.param("lora, fsdp", "lora, ddp", marks=pytest.mark.slow),
        ("lora, fsdp, pieces", "lora, ddp"),
        ("last, fsdp", "last, ddp"),
    ],
)
def test_every_way_of_running_ends_at_the_same_weights(
    name: str, reference: str, results: list[dict[str, dict[str, Any]]]
) -> None:
    found, expected = results[0][name], results[0][reference]
    assert found["trained"] == expected["trained"]
    for key, value in expected["weights"].items():
        np.testing.assert_allclose(found["weights"][key], value, rtol=0, atol=2e-4, err_msg=key)


def test_the_start_stays_whole_under_fsdp(results: list[dict[str, dict[str, Any]]]) -> None:
    begun = start().state_dict()["vl_image_proj.weight"].numpy()
    for name in ("last, ddp", "last, fsdp"):
        weights = results[0][name]["weights"]
        assert np.array_equal(weights["vl_image_proj.start"], begun)
        assert not np.array_equal(weights["vl_image_proj.weight"], begun)
