"""Two real processes under FSDP2: they train as one process does, go on after a stop, and keep whole checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor

from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.parallelize import gather_model
from m2_encoder.strategies.grouped_fsdp import GroupedFSDPStrategy
from m2_encoder.strategies.single import LocalStrategy
from m2_encoder.training.callbacks.checkpoint import RunCheckpoint
from tests.support.ranks import run_lightning_ranks
from tests.support.training import LIGHTNING_WARNINGS, make_datamodule, make_module, make_trainer, tiny_config

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

STEPS = 4
EVAL_BATCH_SIZE = 360  # of 721 items: the first rank has a chunk more than the second would have


def fit(
    folder: str,
    emoji_folder: str,
    *,
    strategy: Any,
    devices: int = 2,
    max_steps: int = STEPS,
    drop_path_rate: float = 0.0,
    resume: bool = False,
    **overrides: Any,
) -> dict[str, Any]:
    """A short run, or its second half; what it ends with, whole on the first rank."""
    lightning.seed_everything(3, workers=True, verbose=False)
    module = make_module(max_steps=STEPS, lr=1e-2, model=tiny_config(num_layers=2, drop_path_rate=drop_path_rate))
    keeper = RunCheckpoint(folder=Path(folder), every_n_steps=2)
    trainer = make_trainer(
        Path(folder),
        max_steps=max_steps,
        callbacks=[keeper],
        strategy=strategy,
        devices=devices,
        plugins=[LightningEnvironment()],
        **{"gradient_clip_val": 0.01, "val_check_interval": STEPS, **overrides},
    )
    datamodule = make_datamodule(Path(emoji_folder), max_steps=STEPS, eval_batch_size=EVAL_BATCH_SIZE)
    trainer.fit(module, datamodule=datamodule, ckpt_path=keeper.last if resume else None, weights_only=True)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert isinstance(module.model, M2Encoder)
    model = gather_model(module.model)
    weights = {} if model is None else {name: value.numpy() for name, value in model.state_dict().items()}
    return {"metrics": metrics, "weights": weights}


def train(rank: int, emoji_folder: str, folder: str) -> dict[str, Any]:
    """Several runs, since starting processes takes longer than they do; one goes on where a process alone stopped."""
    warnings.simplefilter("ignore")
    noisy = {"drop_path_rate": 0.5}
    stopped = f"{folder}/stopped"
    results = {
        "world": fit(
            f"{folder}/world", emoji_folder, strategy=GroupedFSDPStrategy(micro_batches=2), limit_val_batches=1.0
        ),
        "whole": fit(f"{folder}/whole", emoji_folder, strategy=GroupedFSDPStrategy(group_size=1), **noisy),
        "half": fit(stopped, emoji_folder, strategy=GroupedFSDPStrategy(group_size=1), max_steps=2, **noisy),
        "other half": fit(stopped, emoji_folder, strategy=GroupedFSDPStrategy(group_size=1), resume=True, **noisy),
        "from one": fit(f"{folder}/from one", emoji_folder, strategy=GroupedFSDPStrategy(), resume=True),
        "half precision": fit(
            f"{folder}/bf16",
            emoji_folder,
            strategy=GroupedFSDPStrategy(activation_checkpointing=True, reshard_after_forward=False),
            precision="bf16-mixed",
        ),
    }
    assert rank == 0 or not any(result["weights"] for result in results.values())
    return results


@pytest.fixture(scope="module")
def split(
    emoji_folder: Path, tmp_path_factory: pytest.TempPathFactory, alone: tuple[dict[str, Any], Path]
) -> tuple[dict[str, Any], Path]:
    """What the first rank ends with, and the folder of its runs."""
    folder = tmp_path_factory.mktemp("split")
    (folder / "from one").mkdir()
    (folder / "from one" / "last.ckpt").write_bytes((alone[1] / "step=2.ckpt").read_bytes())
    first, second = run_lightning_ranks(train, 2, str(emoji_folder), str(folder))
    for name, result in first.items():
        assert result["metrics"] == second[name]["metrics"], name
    return first, folder


@pytest.fixture(scope="module")
def alone(emoji_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What one process with all rows ends with, and its folder."""
    folder = tmp_path_factory.mktemp("alone")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ended = fit(str(folder), str(emoji_folder), strategy=LocalStrategy("cpu"), devices=1, limit_val_batches=1.0)
    return ended, folder


def furthest(ours: dict[str, Any], expected: dict[str, Any]) -> float:
    assert ours.keys() == expected.keys()
    return max(float(abs(ours[name] - expected[name]).max()) for name in expected)


def test_split_weights_train_as_one_process_does(
    split: tuple[dict[str, Any], Path], alone: tuple[dict[str, Any], Path]
) -> None:
    ours, (expected, _) = split[0]["world"], alone
    # Adam's first steps divide by the gradient's own size, which makes much of fp32 rounding.
    assert furthest(ours["weights"], expected["weights"]) < 2e-3
    assert ours["metrics"].keys() == expected["metrics"].keys()
    for name, value in ours["metrics"].items():
        if not name.startswith("val/"):
            assert value == pytest.approx(expected["metrics"][name], rel=1e-3), name
        else:  # one of 721 items more or less
            assert value == pytest.approx(expected["metrics"][name], abs=0.6), name
    assert expected["metrics"]["train/grad_norm"] > 0.012, "nothing was clipped"
    assert any(name.startswith("val/") for name in ours["metrics"])


def test_a_run_goes_on_as_if_it_had_not_stopped(split: tuple[dict[str, Any], Path]) -> None:
    results, _ = split
    assert furthest(results["other half"]["weights"], results["whole"]["weights"]) == 0
    assert results["other half"]["metrics"] == results["whole"]["metrics"]
    assert furthest(results["half"]["weights"], results["whole"]["weights"]) > 1e-3, "nothing was learned in between"
    assert furthest(results["world"]["weights"], results["whole"]["weights"]) > 1e-3, "groups change nothing"


def test_a_checkpoint_is_whole(split: tuple[dict[str, Any], Path]) -> None:
    results, folder = split
    state = torch.load(folder / "stopped" / "last.ckpt", weights_only=True)
    assert state["global_step"] == STEPS
    assert len(state["random_states"]) == 2
    weights = {name.removeprefix("model."): value.numpy() for name, value in state["state_dict"].items()}
    assert furthest(weights, results["other half"]["weights"]) == 0
    (optimizer,) = state["optimizer_states"]
    moments: list[Tensor] = [entry["exp_avg"] for entry in optimizer["state"].values()]
    whole = {tuple(value.shape) for value in weights.values()}
    assert {tuple(moment.shape) for moment in moments} <= whole
    assert len(moments) > 10


def test_one_process_goes_on_where_two_stopped(
    split: tuple[dict[str, Any], Path], alone: tuple[dict[str, Any], Path], emoji_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "last.ckpt").write_bytes((split[1] / "world" / "step=2.ckpt").read_bytes())
    continued = fit(
        str(tmp_path), str(emoji_folder), strategy=LocalStrategy("cpu"), devices=1, resume=True, limit_val_batches=1.0
    )
    assert furthest(continued["weights"], alone[0]["weights"]) < 2e-3


def test_two_go_on_where_one_process_stopped(
    split: tuple[dict[str, Any], Path], alone: tuple[dict[str, Any], Path]
) -> None:
    """With the moments of its optimizer, parameter by parameter: others would lead elsewhere."""
    assert furthest(split[0]["from one"]["weights"], alone[0]["weights"]) < 2e-3
    (optimizer,) = torch.load(alone[1] / "step=2.ckpt", weights_only=True)["optimizer_states"]
    (again,) = torch.load(split[1] / "from one" / "last.ckpt", weights_only=True)["optimizer_states"]
    assert optimizer["state"].keys() == again["state"].keys()


def test_half_precision_stays_near_full(split: tuple[dict[str, Any], Path], alone: tuple[dict[str, Any], Path]) -> None:
    half, full = split[0]["half precision"]["metrics"], alone[0]["metrics"]
    assert half["train/loss/total"] == pytest.approx(full["train/loss/total"], rel=0.05)
    assert half["train/loss/total"] != full["train/loss/total"]
    assert half["train/skipped_steps"] == 0
