"""A compiled encoder trains as an eager one does, and its checkpoints are the same files to everyone else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m2_encoder.strategies.single import LocalStrategy
from m2_encoder.training.adaptation import Adaptation
from m2_encoder.training.adaptations.lora import Lora
from tests.support.training import LIGHTNING_WARNINGS, make_datamodule, make_module, make_trainer, tiny_config

pytestmark = [pytest.mark.slow, *(pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS)]


def _train(
    folder: Path, emoji_folder: Path, *, compiled: bool, adaptation: Adaptation | None = None, **strategy: Any
) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model = tiny_config(num_layers=2, drop_path_rate=0.5)
    module = make_module(max_steps=4, model=model, compiled=compiled, adaptation=adaptation)
    trainer = make_trainer(folder, max_steps=4, strategy=LocalStrategy("cpu", **strategy))
    trainer.fit(module, datamodule=make_datamodule(emoji_folder, max_steps=4))
    state: dict[str, Tensor] = module.state_dict()
    return state


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "strategy",
    [
        {},
        {"micro_batches": 4},
        {"micro_batches": 2, "activation_checkpointing": True},
        {"micro_batches": 2, "recompute": False},
    ],
)
def test_the_same_training_and_the_same_names(tmp_path: Path, emoji_folder: Path, strategy: dict[str, Any]) -> None:
    eager = _train(tmp_path, emoji_folder, compiled=False, **strategy)
    compiled = _train(tmp_path, emoji_folder, compiled=True, **strategy)
    assert compiled.keys() == eager.keys()
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.filterwarnings("ignore")
def test_low_rank_updates_train_alike(tmp_path: Path, emoji_folder: Path) -> None:
    """Dropout included: its random numbers are those of eager layers."""
    eager, compiled = (
        _train(tmp_path, emoji_folder, compiled=each, adaptation=Lora(rank=2, dropout=0.2), micro_batches=2)
        for each in (False, True)
    )
    assert any("lora_B" in name and value.any() for name, value in eager.items())
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=2e-5, msg=name)
