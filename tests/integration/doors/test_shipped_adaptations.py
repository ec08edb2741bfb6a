"""`m2-train adaptation=…`: trained, gone on with, exported whole and apart, and refused where it does not fit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import m2_encoder
from m2_encoder.cli.commands import EXPORT
from tests.integration.doors.conftest import Train

Export = Callable[..., int]


@pytest.fixture
def m2_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Export:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["m2-export", f"run.folder={tmp_path / 'outputs'}", *arguments])
        return EXPORT()

    return run


QUICK = ("evaluation=[]",)


def read(folder: Path) -> dict[str, Tensor]:
    return m2_encoder.load(folder).model.state_dict()


@pytest.fixture
def base(m2_train: Train, tmp_path: Path) -> Path:
    """A trained model to begin from."""
    run = m2_train(*QUICK)
    return run.rename(tmp_path / "base") / "export"


@pytest.mark.slow
def test_low_rank_updates_through_all_commands(
    base: Path, m2_train: Train, m2_export: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = ("adaptation=lora", "adaptation.rank=3", f"model.weights={base}", "optimizer.weight_decay=0.5", *QUICK)
    run = m2_train(*lora)
    m2_train(*lora, "trainer.max_steps=4", "run.resume=must")

    capsys.readouterr()
    m2_train(*lora[2:], "adaptation=lora", "adaptation.rank=4", "trainer.max_steps=6", "run.resume=must", code=2)
    assert "adaptation.rank=4: was 3 in the run that is continued" in capsys.readouterr().err
    m2_train(*lora, "adaptation.alpha=5", "trainer.max_steps=6", "run.resume=must", code=2)
    assert "adaptation.alpha=5: must be 16, as in the run that is continued" in capsys.readouterr().err

    assert m2_export("run.name=mine", f"output={tmp_path / 'apart'}", "to=[peft]") == 0
    adapter = tmp_path / "apart" / "adapter"
    merged, begun = read(run / "export"), read(base)
    moved = {name for name, value in merged.items() if not torch.equal(value, begun[name])}
    assert "logit_scale" in moved
    assert all(".layers." in name and name.endswith("weight") for name in moved - {"logit_scale"})
    for name, value in m2_encoder.load(base, adapter=adapter).model.state_dict().items():
        torch.testing.assert_close(value, merged[name], rtol=0, atol=1e-6)

    m2_export(f"model={base}", f"adapter={adapter}", f"output={tmp_path / 'again'}")
    for name, value in read(tmp_path / "again").items():
        torch.testing.assert_close(value, merged[name], rtol=0, atol=1e-6)

    capsys.readouterr()
    assert m2_export(f"model={run / 'export'}", f"adapter={adapter}", f"output={tmp_path / 'twice'}") == 2
    assert "belongs to other weights" in capsys.readouterr().err
    assert m2_export(f"model={base}", f"output={tmp_path / 'none'}", "to=[peft]") == 2
    assert "which a run with adaptation=lora alone has" in capsys.readouterr().err

    started = (f"adaptation.start={adapter}", "run.name=second", "trainer.max_steps=1")
    m2_train(*lora, *started)
    m2_train("adaptation=lora", "adaptation.rank=2", f"model.weights={base}", *started, "run.name=third", code=2)
    assert "has rank 3 and alpha 16; use rank=3 alpha=16" in capsys.readouterr().err
    m2_train("adaptation=lora", "adaptation.rank=3", *started, "run.name=third", code=2)
    assert "starts from random ones; give model.weights" in capsys.readouterr().err
    m2_train(*lora, *started, f"model.weights={run / 'export'}", "run.name=third", code=2)
    assert "belongs to other weights" in capsys.readouterr().err
    assert not (tmp_path / "outputs" / "third" / "config.yaml").exists()


@pytest.mark.slow
def test_a_start_is_taken_up(base: Path, m2_train: Train, m2_export: Export, tmp_path: Path) -> None:
    """A first step of learning rate 0 would change nothing: what is exported then is what the adapter was."""
    lora = ("adaptation=lora", "adaptation.rank=3", f"model.weights={base}", "adaptation.also=[projections]", *QUICK)
    m2_train(*lora)
    m2_export("run.name=mine", f"output={tmp_path / 'apart'}", "to=[peft]")
    expected = read(tmp_path / "outputs" / "mine" / "export")
    m2_train(*lora, f"adaptation.start={tmp_path / 'apart' / 'adapter'}", "run.name=second", "optimizer.lr=1e-12")
    for name, value in read(tmp_path / "outputs" / "second" / "export").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


def test_locked_and_last(base: Path, m2_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = read(base)
    run = m2_train("adaptation=locked", f"model.weights={base}", "optimizer.weight_decay=0.5", *QUICK)
    moved = {name for name, value in read(run / "export").items() if not torch.equal(value, begun[name])}
    assert moved
    assert not [name for name in moved if name.startswith(("image_embed", "vl_encoder", "vl_image", "image_proj"))]
    capsys.readouterr()
    again = (f"model.weights={base}", "optimizer.weight_decay=0.5", "trainer.max_steps=4", "run.resume=must", *QUICK)
    m2_train("adaptation=locked", "adaptation.towers=[text]", *again, code=2)
    assert "adaptation.towers=" in capsys.readouterr().err

    run = m2_train("adaptation=last", f"model.weights={base}", "run.name=last", *QUICK)
    last = run.parent / "last"
    moved = {name for name, value in read(last / "export").items() if not torch.equal(value, begun[name])}
    assert moved == {"vl_image_proj.weight", "vl_text_proj.weight", "logit_scale"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("adaptation=lora", "adaptation.alpha=0"), "adaptation.alpha=0: must be"),
        (("adaptation=lora", "adaptation.rank=4096"), "adaptation.rank=4096: must be at most"),
        (("adaptation=lora", "adaptation.experts=[audio]"), "vision_expert, text_expert"),
        (("adaptation=lora", "adaptation.first_layer=9"), "adaptation.first_layer=9: must be at most"),
        (("adaptation=locked", "adaptation.towers=[sound]"), "image, text"),
        (("adaptation=locked", "adaptation.layers=77"), "adaptation.layers=77: must be at most"),
        (("adaptation=last", "adaptation.pull=-1"), "adaptation.pull=-1: must be"),
        (("adaptation=lora", "adaptation.start=nowhere", "model.weights=null"), "adaptation.start="),
    ],
)
def test_one_line_before_anything_starts(
    arguments: tuple[str, ...], said: str, m2_train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    run = m2_train(*arguments, code=2)
    err = capsys.readouterr().err
    assert said in err
    assert not (run / "config.yaml").exists()
