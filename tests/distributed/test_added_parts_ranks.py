"""Added parts on two ranks: objectives as in one process, in pieces, and sharded in real Lightning runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch.utils.data import DataLoader

from m2_encoder.distributed.gradients import whole_tensor
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.parallelize import gather_model
from m2_encoder.objectives.captioning import Captioning
from m2_encoder.objectives.contrastive import ImageTextContrastive
from m2_encoder.objectives.masked_image import MaskedImage
from m2_encoder.objectives.masked_language import MaskedLanguage
from m2_encoder.objectives.matching import Matching
from m2_encoder.objectives.routing import BalancedRouting
from m2_encoder.objectives.sigmoid import SigmoidContrastive
from m2_encoder.objectives.text_contrast import TextContrast
from m2_encoder.training.adaptation import Adaptation, merge_adaptation
from m2_encoder.training.adaptations.adapters import PerLanguage
from m2_encoder.training.adaptations.mixture import Upcycling
from m2_encoder.training.adaptations.prompts import DeepPrompts
from m2_encoder.types import ImageTextBatch
from tests.distributed.test_objective_ranks import PIECES, RANKS, ROWS, BlockMatching
from tests.distributed.test_objective_training import DDP, FSDP, STEPS, Run, make_rows
from tests.support.added_parts import FewPieces
from tests.support.objectives import CONFIG, Numbers, build_bench, make_batch, part_of, take_numbers
from tests.support.ranks import run_lightning_ranks, run_ranks
from tests.support.training import LIGHTNING_WARNINGS, make_module, make_trainer, tiny_config

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]


def make_adapters() -> Adaptation:
    adaptation: Any = PerLanguage(width=3)
    adaptation.prepare(FewPieces(CONFIG.vocab_size))
    return adaptation


ADAPTATIONS: dict[str, Callable[[], Adaptation]] = {
    "prompts": lambda: DeepPrompts(3),
    "adapters": make_adapters,
    "mixture": lambda: Upcycling(copies=3),
}
OBJECTIVES: dict[str, Callable[[], Any]] = {
    "itc": lambda: {"itc": ImageTextContrastive()},
    "all": lambda: {
        "itc": ImageTextContrastive(),
        "sigmoid": SigmoidContrastive(weight=0.5),
        "text_contrast": TextContrast(max_similarity=1.0),
        "captioning": Captioning(),
        "cmlm": MaskedLanguage(weight=0.5),
        "cmim": MaskedImage(),
        "matching": BlockMatching(),
    },
}


def work(rank: int) -> dict[str, Numbers]:
    return run_cases(rank, dist.group.WORLD)


def run_cases(rank: int, group: dist.ProcessGroup | None) -> dict[str, Numbers]:
    found = {}
    ranks = 1 if group is None else RANKS
    for adaptation, adapt in ADAPTATIONS.items():
        for objectives, build in OBJECTIVES.items():
            batch = part_of(make_batch(ROWS, 2), rank, ranks)
            for pieces, recompute in PIECES if ranks > 1 else PIECES[:1]:
                options: dict[str, Any] = {"micro_batches": pieces, "recompute": recompute, "contrastive_group": group}
                routing = {"routing": BalancedRouting()} if adaptation == "mixture" else {}
                module = build_bench(build() | routing, adaptation=adapt(), **options)
                key = f"{adaptation} {objectives}"
                found[f"{key} {pieces}" if ranks > 1 else key] = take_numbers(module, batch)
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Numbers]:
    return run_cases(0, None)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Numbers]]:
    return run_ranks(work, RANKS, folder=tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("pieces", [pieces for pieces, _ in PIECES])
@pytest.mark.parametrize("objectives", list(OBJECTIVES))
@pytest.mark.parametrize("adaptation", list(ADAPTATIONS))
def test_ranks_and_pieces_equal_one_process(
    adaptation: str,
    objectives: str,
    pieces: int,
    alone: dict[str, Numbers],
    together: list[dict[str, Numbers]],
) -> None:
    expected = alone[f"{adaptation} {objectives}"]
    trained = {name for name in expected if "backbone" in name}
    assert len(trained) == {"prompts": 3, "adapters": 8, "mixture": 2 * (3 * 6 + 1)}[adaptation]
    moved = [name for name in trained if np.abs(expected[name]).max() > 1e-6]
    assert len(moved) >= len(trained) - 6 * ("mixture" in adaptation), "gradients near 0 would prove nothing"
    assert adaptation != "mixture" or sum("router" in name for name in moved) == 2
    for result in together:
        found = result[f"{adaptation} {objectives} {pieces}"]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-8, atol=1e-11, err_msg=key)


RUNS = {
    "ddp": Run(DDP, {}, "32-true"),
    "fsdp in pieces": Run(FSDP, {"micro_batches": 2, "recompute": True, "activation_checkpointing": True}, "32-true"),
    "fsdp": Run(FSDP, {}, "32-true"),
}


def train(run: Run, adaptation: Adaptation, rank: int, folder: str) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning.seed_everything(6, verbose=False)
        module = make_module(
            model=tiny_config(),
            max_steps=STEPS,
            objectives={
                **OBJECTIVES["all"](),
                **({"routing": BalancedRouting()} if isinstance(adaptation, Upcycling) else {}),
                "cmim": MaskedImage(masking="attentive", mask_ratio=0.5),
                "matching": Matching(schedule={0: 0, 1: 1}),
            },
            adaptation=adaptation,
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
        batches: list[ImageTextBatch] = [make_rows(rank, step) for step in range(STEPS)]
        trainer.fit(module, train_dataloaders=DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    weights = {name: whole_tensor(p.detach()).double().numpy() for name, p in module.named_parameters()}
    whole = gather_model(module.model, module.build_unfilled)
    merged: Any = None
    if whole is not None:
        merged = merge_adaptation(adaptation, whole)
        plain = M2Encoder(merged.config)
        plain.load_state_dict(merged.state_dict())
        merged = {name: value.numpy() for name, value in merged.state_dict().items() if "han" in name}
    return {"weights": weights, "merged": merged}


def train_all(rank: int, folder: str) -> dict[str, dict[str, Any]]:
    found = {}
    for name, run in RUNS.items():
        adaptations: dict[str, Any] = {
            "prompts": DeepPrompts(3),
            "adapters": PerLanguage(width=3),
            "mixture": Upcycling(copies=3),
        }
        adaptations["adapters"].prepare(FewPieces(3500))
        for adaptation, each in adaptations.items():
            found[f"{adaptation} {name}"] = train(run, each, rank, f"{folder}/{adaptation}/{name}")
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return run_lightning_ranks(train_all, RANKS, str(tmp_path_factory.mktemp("runs")))


@pytest.mark.slow
@pytest.mark.parametrize("run", [name for name in RUNS if name != "ddp"])
@pytest.mark.parametrize("adaptation", list(ADAPTATIONS))
def test_sharded_runs_end_where_whole_ones_do(
    adaptation: str, run: str, trained: list[dict[str, dict[str, Any]]]
) -> None:
    expected = trained[0][f"{adaptation} ddp"]["weights"]
    for result in trained:
        found = result[f"{adaptation} {run}"]["weights"]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=name)
    if adaptation == "adapters":
        marked = trained[0][f"{adaptation} {run}"]["merged"]["text_embed.han_pieces"]
        assert marked.tolist() == [float(index % 9 == 0) for index in range(3500)]
