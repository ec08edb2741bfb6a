"""An adaptation of a user's own: one class, one YAML file, nothing of the package edited."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import m2_encoder
from m2_encoder.cli.commands import EXPORT
from m2_encoder.errors import UserError
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.runs.build import build_adaptation
from m2_encoder.types import TextTokens
from tests.integration.doors.conftest import Own, Train

LORA = """
    import torch
    from torch import nn

    from m2_encoder.training.adaptation import Adaptation


    class LowRank(nn.Module):
        def __init__(self, base, rank):
            super().__init__()
            self.base = base
            self.down = nn.Linear(base.in_features, rank, bias=False)
            self.up = nn.Linear(rank, base.out_features, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))


    class Lora(Adaptation):
        def __init__(self, rank: int = 2):
            self.rank = rank

        def apply(self, model):
            model.requires_grad_(False)
            for layer in model.backbone.layers:
                layer.vision_expert.q_proj = LowRank(layer.vision_expert.q_proj, self.rank)

        def merge(self, model):
            for layer in model.backbone.layers:
                found = layer.vision_expert.q_proj
                found.base.weight += found.up.weight @ found.down.weight
                layer.vision_expert.q_proj = found.base
            return model


    class Unmerged(Lora):
        def merge(self, model):
            return model
"""


@pytest.fixture
def mine(own: Own) -> None:
    own.write("my_adaptations.py", LORA)
    own.write("adaptation/mine.yaml", "_target_: my_adaptations.Lora\nrank: 2\n")
    own.write("adaptation/unmerged.yaml", "_target_: my_adaptations.Unmerged\n")


def read(run: Path) -> dict[str, Tensor]:
    state: dict[str, Any] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}


def take_features(model: M2Encoder) -> Tensor:
    images = torch.rand((3, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    ids = torch.arange(3, 15).reshape(3, 4)
    with torch.no_grad():
        return torch.cat([model.encode_image(images), model.encode_text(TextTokens(ids, torch.ones_like(ids).bool()))])


def check_export(run: Path) -> None:
    """What was exported is plain, and computes what the trained model does."""
    exported = m2_encoder.load(run / "export").model
    config = M2EncoderConfig.from_dict({**exported.config.to_dict()})
    adapted = M2Encoder(config).eval()
    import_module("my_adaptations").Lora(2).apply(adapted)
    adapted.load_state_dict(read(run))
    torch.testing.assert_close(take_features(exported), take_features(adapted), rtol=1e-5, atol=1e-6)
    plain = M2Encoder(config)
    assert exported.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.usefixtures("mine")
def test_low_rank_updates(
    own: Own, m2_train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = m2_train("adaptation=mine", "optimizer.weight_decay=0.5")
    begun = read(run)
    check_export(run)
    m2_train("adaptation=mine", "optimizer.weight_decay=0.5", "trainer.max_steps=4", "run.resume=must")
    ended = read(run)
    moved = {name for name in begun if not torch.equal(begun[name], ended[name])}
    assert moved == {name for name in begun if ".down." in name or ".up." in name}
    assert len(moved) == 4
    check_export(run)

    command = ["m2-export", f"run.folder={run.parent}", "run.name=mine", f"output={run / 'two'}"]
    monkeypatch.setattr(sys, "argv", command)
    assert EXPORT() == 2
    assert "--config-dir FOLDER" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*command, "--config-dir", str(own.folder)])
    assert EXPORT() == 0
    first, second = (m2_encoder.load(run / name).model.state_dict() for name in ("export", "two"))
    assert all(torch.equal(first[name], second[name]) for name in first)

    capsys.readouterr()
    m2_train("adaptation=full", "optimizer.weight_decay=0.5", "trainer.max_steps=6", "run.resume=must", code=2)
    assert "its checkpoint does not fit: it has no backbone" in capsys.readouterr().err.replace("model.", "")


@pytest.mark.usefixtures("mine")
def test_what_merges_to_no_plain_model_is_refused_before_training(
    m2_train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    run = m2_train("adaptation=unmerged", code=2)
    assert "adaptation=Unmerged: `merge` must give back a plain model" in capsys.readouterr().err
    assert not (run / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("mine")
def test_weights_split_over_two_ranks(own: Own, emoji_folder: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "m2_encoder.cli.train", "--config-dir", str(own.folder), "+experiment=smoke"),
        *(f"data.folder={emoji_folder}", f"run.folder={tmp_path}", "run.name=two", "adaptation=mine"),
        *("strategy=grouped_fsdp", "trainer.devices=2", "trainer.max_steps=2", "scheduler.warmup_steps=0"),
        *("scheduler.max_steps=2", "trainer.val_check_interval=2", "trainer.limit_val_batches=0"),
    ]
    paths = os.pathsep.join([str(own.folder), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": paths}, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    check_export(tmp_path / "two")


def test_a_class_that_is_gone_is_named_where_a_run_is_exported() -> None:
    node = {"_target_": "no_such_module.Lora"}
    with pytest.raises(
        UserError, match=r"adaptation\._target_=no_such_module\.Lora: there is no module no_such_module"
    ):
        build_adaptation({"adaptation": node}, M2EncoderConfig())
