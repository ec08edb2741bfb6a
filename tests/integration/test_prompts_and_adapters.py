"""`adaptation=prompts`, `adapters` and `mixture` from the command line: train, go on, export, start again from it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m2_encoder import load
from m2_encoder.cli import train
from m2_encoder.cli.commands import EXPORT
from m2_encoder.config.model_choice import build_model_config
from m2_encoder.runs.export import read_trained
from m2_encoder.runs.folder import read_config
from tests.support.added_parts import MIXTURE_FIELDS
from tests.support.training import LIGHTNING_WARNINGS

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

Train = Callable[..., Path]

CHOSEN = {
    "prompts": ["adaptation=prompts"],
    "adapters": ["adaptation=adapters"],
    "mixture": ["adaptation=mixture", "objective=[itc,routing]"],
}
MOVED = {
    "prompts": ["logit_scale"],
    "adapters": ["logit_scale"],
    "mixture": ["logit_scale", "expert.fc1", "expert.ffn_inner_norm", "expert.fc2"],
}


def arguments(emoji_folder: Path, outputs: Path, name: str) -> list[str]:
    return [
        *("+experiment=smoke", f"data.folder={emoji_folder}", f"run.folder={outputs}", f"run.name={name}"),
        *("trainer.max_steps=2", "scheduler.max_steps=4", "scheduler.warmup_steps=0", "optimizer.lr=0.01"),
        *("trainer.val_check_interval=2", "trainer.limit_val_batches=0"),
    ]


@pytest.fixture
def m2_train(emoji_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    def run(name: str, *more: str, code: int = 0) -> Path:
        monkeypatch.setattr(sys, "argv", ["m2-train", *arguments(emoji_folder, tmp_path, name), *more])
        assert train.main() == code
        return tmp_path / name

    return run


def read(run: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state


def features(run: Path) -> Tensor:
    model, _, tokenizer = load(run / "export")
    images = torch.rand((3, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.cat([model.encode_image(images), model.encode_text(tokenizer(["一只猫", "a cat"]))])


@pytest.mark.slow
@pytest.mark.parametrize("adaptation", list(CHOSEN))
def test_a_run_and_what_follows_it(
    adaptation: str, m2_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = m2_train("base")
    start = [f"model.weights={base / 'export'}", *CHOSEN[adaptation]]
    whole = m2_train("whole", *start, "trainer.max_steps=4")
    m2_train("parted", *start)
    parted = m2_train("parted", *start, "trainer.max_steps=4", "run.resume=must")
    ended = read(whole)
    assert all(torch.equal(value, read(parted)[name]) for name, value in ended.items()), "as without the break"
    assert features(whole).equal(features(parted))
    assert (features(whole) - features(base)).abs().max() > 1e-4
    plain = read(base)
    frozen = {name for name in plain if not any(part in name for part in MOVED[adaptation])}
    assert frozen
    assert all(torch.equal(plain[name], ended[name]) for name in frozen)

    command = ["m2-export", f"run.folder={tmp_path}", "run.name=whole", f"output={whole / 'again'}"]
    monkeypatch.setattr(sys, "argv", command)
    assert EXPORT() == 0
    first, second = (load(whole / name).model for name in ("export", "again"))
    assert first.config == second.config
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())

    fields = ("num_prompts", "prompt_layers", "adapter_width", *MIXTURE_FIELDS)
    parts = {name: getattr(first.config, name) for name in fields}
    assert sum(value > 0 for value in parts.values()) == {"prompts": 2, "adapters": 1, "mixture": 4}[adaptation]
    onward = [f"model.weights={whole / 'export'}", *(f"model.{name}={value}" for name, value in parts.items())]
    further = m2_train("further", *onward)
    assert load(further / "export").model.config == first.config, "the parts are trained with everything else"
    saved = read_config(further / "config.yaml")
    assert build_model_config(saved["model"]) == first.config
    assert read_trained(saved, further / "checkpoints" / "last.ckpt").config == first.config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["adaptation=prompts", "adaptation.layers=3"],
            "adaptation.layers=3: must not exceed 2, the layers of the backbone",
        ),
        (["adaptation=prompts", "adaptation.num_prompts=0"], "adaptation.num_prompts=0: must be"),
        (["adaptation=adapters", "adaptation.width=0"], "adaptation.width=0: must be"),
        (["adaptation=adapters", "adaptation.languages=[fr]"], "adaptation.languages=[fr]: must be"),
        (["adaptation=adapters", "adaptation.languages=[]"], "adaptation.languages=[]: must"),
        (
            ["adaptation=mixture", "adaptation.text_layers=3"],
            "adaptation.text_layers=3: must not exceed 2, the layers of",
        ),
        (["adaptation=mixture", "adaptation.top_k=5"], "adaptation.top_k=5: must be at most copies=4"),
        (["adaptation=mixture", "adaptation.copies=1"], "adaptation.copies=1: must be"),
        (
            ["objective=[itc,routing]"],
            "needs a model with mixtures; use adaptation=mixture, or leave it out of objective",
        ),
        (
            ["model.mixture_copies=4", "model.mixture_top_k=2", "model.mixture_text_layers=1"],
            "model.mixture_copies=4: is of weights that were adapted, and there are none",
        ),
        (["model.adapter_width=4"], "model.adapter_width=4: is of weights that were adapted, and there are none"),
    ],
)
def test_what_cannot_be_is_one_line_before_work_starts(
    given: list[str], message: str, m2_train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    run = m2_train("refused", *given, code=2)
    assert message in capsys.readouterr().err
    assert not (run / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("adaptation", list(CHOSEN))
def test_two_ranks_with_split_weights_export_a_plain_model(adaptation: str, emoji_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "m2_encoder.cli.train", *arguments(emoji_folder, tmp_path, "two")]
    more = [*CHOSEN[adaptation], "strategy=grouped_fsdp", "trainer.devices=2", "strategy.micro_batches=2"]
    done = subprocess.run(
        [*command, *more], capture_output=True, text=True, timeout=300, env=dict(os.environ), check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "two"
    saved: dict[str, Any] = read_config(run / "config.yaml")
    trained = read_trained(saved, run / "checkpoints" / "last.ckpt")
    exported = load(run / "export").model
    assert trained.config == exported.config
    assert all(torch.equal(value, exported.state_dict()[name]) for name, value in trained.state_dict().items())
    if adaptation == "adapters":
        assert 0 < exported.text_embed.han_pieces.sum() < exported.config.vocab_size
