"""The moving average of the weights on two ranks, replicated and split: its formula, validation, and going on."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor

from m2_encoder.models.parallelize import gather_model
from m2_encoder.strategies.grouped_ddp import GroupedDDPStrategy
from m2_encoder.strategies.grouped_fsdp import GroupedFSDPStrategy
from m2_encoder.strategies.single import LocalStrategy
from m2_encoder.training.callbacks.average import WeightAverage
from m2_encoder.training.callbacks.checkpoint import RunCheckpoint
from m2_encoder.training.optim import build_optimizer
from tests.support.ranks import run_lightning_ranks
from tests.support.training import LIGHTNING_WARNINGS, make_datamodule, make_module, make_trainer

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

STEPS, DECAY = 4, 0.8


def fit(folder: str, data: str, *, strategy: Any, devices: int = 2, steps: int = STEPS, **more: Any) -> dict[str, Any]:
    """A short run, or the rest of one; the metrics of its validations, and its average on the first rank."""
    lightning.seed_everything(3, workers=True, verbose=False)
    optimizer = partial(build_optimizer, lr=1e-2, layer_decay=0.7, text_lr_ratio=0.5)  # a group for each rate
    module = make_module(max_steps=STEPS, optimizer=optimizer)
    average = WeightAverage(decay=DECAY, start_step=1)
    keeper = RunCheckpoint(folder=Path(folder), every_n_steps=more.pop("every", 1))
    resume = more.pop("resume", False)
    trainer = make_trainer(
        Path(folder),
        max_steps=steps,
        callbacks=[average, keeper],
        strategy=strategy,
        devices=devices,
        plugins=[LightningEnvironment()],
        **{"val_check_interval": 2, "limit_val_batches": 1.0, **more},
    )
    datamodule = make_datamodule(Path(data), max_steps=STEPS, eval_batch_size=360)
    trainer.fit(module, datamodule=datamodule, ckpt_path=keeper.last if resume else None, weights_only=True)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    average.take(module)
    model = gather_model(module.model)
    taken = {} if model is None else {name: value.numpy() for name, value in model.state_dict().items()}
    return {"metrics": metrics, "taken": taken}


def train(rank: int, data: str, folder: str) -> dict[str, Any]:
    """Several runs, since starting processes takes longer than they do."""
    warnings.simplefilter("ignore")

    def split() -> GroupedFSDPStrategy:
        return GroupedFSDPStrategy(group_size=1, reshard_after_forward=False)  # weights stay gathered after validation

    return {
        "ddp": fit(f"{folder}/ddp", data, strategy=GroupedDDPStrategy(micro_batches=2), limit_val_batches=0),
        "split": fit(f"{folder}/split", data, strategy=split()),
        "seen": fit(f"{folder}/seen", data, strategy=split(), every=STEPS),  # saving would let go of what is gathered
        "unseen": fit(f"{folder}/unseen", data, strategy=split(), limit_val_batches=0),
        "half": fit(f"{folder}/parts", data, strategy=split(), steps=3),
        "rest": fit(f"{folder}/parts", data, strategy=split(), resume=True),
    }


@pytest.fixture(scope="module")
def runs(emoji_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("runs")
    return run_lightning_ranks(train, 2, str(emoji_folder), str(folder)), folder


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    content = torch.load(path, weights_only=True)
    return content["state_dict"], content["average"]["weights"]


def furthest(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert ours.keys() == expected.keys()
    return max(float((ours[name].double() - value.double()).abs().max()) for name, value in expected.items())


@pytest.mark.parametrize("name", ["ddp", "split"])
def test_it_is_the_formula_of_the_whole_weights(runs: tuple[list[dict[str, Any]], Path], name: str) -> None:
    saved = [read(runs[1] / name / f"step={step}.ckpt") for step in range(1, STEPS + 1)]
    expected = {key: value.double() for key, value in saved[0][0].items() if key in saved[0][1]}
    for weights, average in saved:
        expected = {key: DECAY * value + (1 - DECAY) * weights[key].double() for key, value in expected.items()}
        assert furthest(average, expected) < 1e-6
    taken = {f"model.{key}": torch.from_numpy(value) for key, value in runs[0][0][name]["taken"].items()}
    assert furthest({key: taken[key] for key in saved[-1][1]}, saved[-1][1]) == 0
    assert len(saved[-1][1]) > 20
    assert furthest({key: saved[-1][0][key] for key in expected}, expected) > 1e-3, "the weights are others"


def test_validating_it_changes_no_weight(runs: tuple[list[dict[str, Any]], Path]) -> None:
    for name in ("split", "seen"):
        for one, other in zip(read(runs[1] / name / "last.ckpt"), read(runs[1] / "unseen" / "last.ckpt"), strict=True):
            assert furthest(one, other) == 0


def test_a_split_run_goes_on_bit_for_bit(runs: tuple[list[dict[str, Any]], Path]) -> None:
    for one, other in zip(read(runs[1] / "split" / "last.ckpt"), read(runs[1] / "parts" / "last.ckpt"), strict=True):
        assert furthest(one, other) == 0
    assert runs[0][0]["split"]["metrics"] == runs[0][1]["rest"]["metrics"]


def test_what_is_validated_is_the_average(
    runs: tuple[list[dict[str, Any]], Path], emoji_folder: Path, tmp_path: Path
) -> None:
    """Its recalls are those of a process that validates the average of the file."""
    module = make_module(max_steps=1, adaptation=None)
    module.configure_model()
    weights, average = read(runs[1] / "split" / "last.ckpt")
    recalls = []
    for state in (weights | average, weights):
        module.load_state_dict(state)
        trainer = make_trainer(tmp_path, max_steps=1, strategy=LocalStrategy("cpu"), limit_val_batches=1.0)
        data = make_datamodule(emoji_folder, max_steps=1, eval_batch_size=360)
        (found,) = trainer.validate(module, datamodule=data, verbose=False)
        recalls.append(found)
    ours = runs[0][0]["split"]["metrics"]
    distances = [max(abs(value - found[name]) for name, value in ours.items()) for found in recalls]
    assert distances[0] < 0.6, "one of 721 items more or less"
    assert distances[0] < distances[1]
