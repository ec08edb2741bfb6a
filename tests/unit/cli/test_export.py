from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from m2_encoder import M2Encoder, M2EncoderConfig, load
from m2_encoder.cli import commands
from m2_encoder.config.compose import open_composer
from m2_encoder.config.model_choice import build_model_config
from m2_encoder.errors import UserError
from m2_encoder.runs.export import read_metrics
from m2_encoder.runs.folder import read_config, write_config

Start = Callable[..., int]
RECALLS = {"i2t_r@1": 12.5, "mean_recall": 20.0}


@pytest.fixture
def run_folder(tmp_path: Path, repo_root: Path) -> Path:
    """What m2-train leaves behind, of a small random model."""
    folder = tmp_path / "outputs" / "try"
    with open_composer(repo_root / "conf", "train") as composer:
        cfg: dict[str, Any] = composer.compose(
            ["+experiment=smoke", "run.name=try", f"run.folder={tmp_path / 'outputs'}"]
        ).cfg
    write_config(folder / "config.yaml", cfg)
    model = M2Encoder(build_model_config(cfg["model"]))
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    (folder / "checkpoints").mkdir()
    for name in ("last.ckpt", "step=3.ckpt"):
        torch.save({"global_step": 3, "state_dict": state}, folder / "checkpoints" / name)
    summary = {"table": {"heldout_style": {"zh": RECALLS, "chance": {"i2t_r@1": 0.1}}}}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


@pytest.fixture
def start(run_folder: Path, monkeypatch: pytest.MonkeyPatch, repo_root: Path) -> Start:
    monkeypatch.chdir(repo_root)

    def run(*argv: str) -> int:
        monkeypatch.setattr(sys, "argv", ["m2-export", f"run.folder={run_folder.parent}", *argv])
        return commands.EXPORT()

    return run


def test_export_loads_with_the_same_weights(start: Start, run_folder: Path) -> None:
    assert start("run.name=try") == 0
    loaded = load(run_folder / "export")
    trained = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, trained[f"model.{name}"]), name
    assert loaded.model.encode_text(loaded.tokenizer(["一只猫"])).shape == (1, 64)


def test_card_says_data_licences_metrics_and_origin(start: Start, run_folder: Path) -> None:
    assert start("run.name=try") == 0
    card = (run_folder / "export" / "README.md").read_text(encoding="utf-8")
    for part in ("Noto Emoji", "CC BY-SA 4.0", "Unicode-3.0", "12.5", "heldout_style", "chance", "m2-export"):
        assert part in card
    assert "Twemoji" not in card, "the held-out style is no training data"
    assert json.loads((run_folder / "export" / "config.json").read_text())["provenance"]["heldout_style"] == "twemoji"


@pytest.mark.parametrize("named", ["step=3.ckpt", "{folder}/checkpoints/step=3.ckpt"])
def test_another_checkpoint_and_output(start: Start, run_folder: Path, named: str) -> None:
    output = run_folder / "a=b"
    assert start("run.name=try", f"checkpoint={named.format(folder=run_folder)}", f"output={output}") == 0
    assert load(output).model.config == M2EncoderConfig.from_dict(
        json.loads((run_folder / "a=b" / "config.json").read_text(encoding="utf-8"))["model"]
    )


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["run.name=tri"], "there is: try"),
        ([], "run.name=???"),
        (["run.name=try", "checkpoint=step=9.ckpt"], "step=9.ckpt"),
        (["run.name=try", "+format=onnx"], "format"),
        (["run.name=try", "overwrite=1"], "true or false"),
    ],
)
def test_mistakes(start: Start, capsys: pytest.CaptureFixture[str], argv: list[str], named: str) -> None:
    assert start(*argv) == 2
    captured = capsys.readouterr()
    assert named in captured.err
    assert len(captured.err.splitlines()) == 1


def test_a_run_without_an_encoder_has_nothing_to_export(
    start: Start, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = read_config(run_folder / "config.yaml")
    write_config(run_folder / "config.yaml", {**cfg, "task": {"_target_": "m2_encoder.training.Other"}})
    (run_folder / "export").mkdir()
    assert start("run.name=try") == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert "trained no encoder" in said
    assert "overwrite" not in said


def test_existing_export_needs_overwrite(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    assert start("run.name=try") == 0
    assert start("run.name=try") == 2
    assert "overwrite=true" in capsys.readouterr().err
    assert start("run.name=try", "overwrite=true") == 0


def test_damaged_summary_is_named(run_folder: Path) -> None:
    (run_folder / "summary.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match=r"summary\.json"):
        read_metrics(run_folder / "summary.json")


def test_no_summary_gives_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "summary.json") == {}


def test_a_checkpoint_of_another_run_is_refused(
    start: Start, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = run_folder.parent / "other"
    shutil.copytree(run_folder, other)
    checkpoint = other / "checkpoints" / "last.ckpt"
    assert start("run.name=try", f"checkpoint={checkpoint}") == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said == f"m2-export: checkpoint={checkpoint}: is of the run in {other}; use run.name=other"
    assert not (run_folder / "export").exists()
    moved = tmp_path / "elsewhere" / "checkpoints" / "last.ckpt"
    shutil.copytree(other, moved.parents[1])
    assert start("run.name=try", f"checkpoint={moved}") == 2
    assert capsys.readouterr().err.strip().endswith(f"; use run.name=elsewhere run.folder={tmp_path}")
    copied = tmp_path / "kept.ckpt"
    shutil.copy(run_folder / "checkpoints" / "last.ckpt", copied)
    assert start("run.name=try", f"checkpoint={copied}") == 0


def test_the_origin_is_that_of_the_training(start: Start, run_folder: Path) -> None:
    """An export that is made later, by another revision, says by what the model was trained."""
    summary = json.loads((run_folder / "summary.json").read_text(encoding="utf-8"))
    trained = {"git_revision": "0123456", "command": "m2-train +experiment=smoke", "versions": {"torch": "2.0"}}
    (run_folder / "summary.json").write_text(json.dumps(summary | trained), encoding="utf-8")
    assert start("run.name=try") == 0
    origin = json.loads((run_folder / "export" / "config.json").read_text(encoding="utf-8"))["provenance"]
    assert (origin["git_revision"], origin["command"]) == ("0123456", "m2-train +experiment=smoke")
    assert origin["versions"] == "torch 2.0"
