"""A run that goes on finds what it began with, or is refused in one line and stays as it was."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from m2_encoder.checkpoints.export import export_model
from m2_encoder.checkpoints.visual_tokenizer import save_visual_tokenizer
from m2_encoder.cli import train as train_command
from m2_encoder.config.model_choice import build_model_config, build_tokenizer
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.visual_tokenizer import VisualTokenizer, VisualTokenizerConfig
from m2_encoder.runs.ending import Results, RunEnd
from m2_encoder.runs.folder import read_config
from m2_encoder.training.module import PretrainModule
from tests.support.training import LIGHTNING_WARNINGS

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

SMALL = (
    "+experiment=smoke", "scheduler.warmup_steps=0", "data.global_batch_size=8", "model.patch_size=8",
    "trainer.limit_val_batches=0", "run.export=false", "logger=csv", "run.name=r",
)  # fmt: skip
PROTOTYPES = "+objective.mine={_target_: tests.support.own_objectives.Prototypes}"
GO_ON = ("run.resume=auto", "trainer.max_steps=3")

Start = Callable[..., int]


@pytest.fixture
def start(repo_root: Path, emoji_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """`m2-train` of two steps without its report, in this process."""
    monkeypatch.chdir(repo_root)
    monkeypatch.setattr("m2_encoder.runs.run.report_run", lambda *_, **__: Results({}, (), tmp_path, 0))
    places = (f"run.folder={tmp_path}", f"data.folder={emoji_folder}")

    def run(*lines: str) -> int:
        steps = () if any(line.startswith("trainer.max_steps=") for line in lines) else ("trainer.max_steps=2",)
        monkeypatch.setattr(sys, "argv", ["m2-train", *SMALL, *places, *steps, *lines])
        return train_command.main()

    return run


@pytest.fixture
def refuse(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Starts a run that is refused; gives the one line that says why."""

    def run(*lines: str) -> str:
        before = _files(tmp_path / "r")
        with monkeypatch.context() as patch:
            patch.setattr("m2_encoder.runs.build.build_loggers", lambda *_, **__: pytest.fail("a logger"))
            capsys.readouterr()
            assert start(*lines) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert _files(tmp_path / "r") == before
        return line.removeprefix("m2-train: ")

    return run


def _files(folder: Path) -> dict[str, bytes]:
    """What a run keeps; Hydra's records say what was asked for."""
    return {
        str(path): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".hydra" not in path.parts and "csv" not in path.parts
    }


def _save_tokenizer(folder: Path, *, num_codes: int = 8) -> Path:
    config = VisualTokenizerConfig(
        image_size=32, patch_size=8, num_codes=num_codes, code_dim=4, embed_dim=8, num_heads=2, num_layers=1
    )
    return save_visual_tokenizer(folder, VisualTokenizer(config), overwrite=True)


def _save_teacher(folder: Path, *, width: int) -> Path:
    values: dict[str, Any] = {
        "name": "tiny", "tokenizer": "emoji", "feature_dim": width, "embed_dim": 32, "num_heads": 2, "num_layers": 1
    }  # fmt: skip
    config = build_model_config(values)
    tokenizer = build_tokenizer(values, config)
    return export_model(folder, model=M2Encoder(config), tokenizer=tokenizer, overwrite=True)


@pytest.mark.parametrize("num_codes", [8, pytest.param(12, marks=pytest.mark.slow)])
def test_another_visual_tokenizer_at_the_same_place(start: Start, refuse: Any, tmp_path: Path, num_codes: int) -> None:
    folder = _save_tokenizer(tmp_path / "codes")
    key = "objective.cmim.targets.tokenizer"
    lines = ("objective=[cmim_codes,itc]", f"{key}={folder}")
    assert start(*lines) == 0
    shutil.copytree(folder, tmp_path / "moved")
    _save_tokenizer(folder, num_codes=num_codes)
    said = refuse(*lines, *GO_ON)
    assert said.startswith(f"{key}={folder}: ")
    assert str(folder / "model.safetensors") in said
    assert "give another run.name" in said
    assert start(lines[0], f"{key}={tmp_path / 'moved'}", *GO_ON) == 0
    assert "give another run.name" in refuse(*lines, "run.resume=auto", "trainer.max_steps=4")


@pytest.mark.parametrize("width", [48, 40])
def test_another_teacher_at_the_same_place(start: Start, refuse: Any, tmp_path: Path, width: int) -> None:
    folder = _save_teacher(tmp_path / "teacher", width=48)
    lines = ("objective=[itc,distillation]", f"objective.distillation.teacher={folder}")
    assert start(*lines) == 0
    _save_teacher(folder, width=width)
    said = refuse(*lines, *GO_ON)
    assert said.startswith(f"objective.distillation.teacher={folder}: ")
    assert str(folder / "model.safetensors") in said


def test_a_run_without_digests_compares_places(start: Start, refuse: Any, tmp_path: Path, repo_root: Path) -> None:
    folder = _save_tokenizer(tmp_path / "codes")
    key = "objective.cmim.targets.tokenizer"
    assert start("objective=[cmim_codes,itc]", f"{key}={folder}") == 0
    (tmp_path / "r" / "frozen.json").unlink()
    other = _save_tokenizer(tmp_path / "other")
    assert refuse("objective=[cmim_codes,itc]", f"{key}={other}", *GO_ON).startswith(f"{key}={other}: ")
    spelt = f"{folder.parent}/other/../codes"
    assert start("objective=[cmim_codes,itc]", f"{key}={spelt}", *GO_ON) == 0
    assert (tmp_path / "r" / "frozen.json").is_file()


def test_parameters_of_another_shape(start: Start, refuse: Any) -> None:
    assert start(PROTOTYPES) == 0
    said = refuse(PROTOTYPES.replace("}", ", sharpness: 2.0, rows: 5}"), *GO_ON)
    assert said == (
        "run.name=r: its checkpoint does not fit: objectives.mine.table is (4, 64) there, (5, 64) now; "
        "leave objective.mine as it was, or give another run.name"
    )
    assert start(PROTOTYPES.replace("}", ", sharpness: 2.0, rows: 4}"), *GO_ON) == 0


def test_an_objective_without_a_weight_counts(start: Start, refuse: Any) -> None:
    assert start(PROTOTYPES) == 0
    said = refuse(*GO_ON)
    assert said.startswith("objective=[itc]: must train the same parameters as [itc,mine], whose run is continued")


def test_what_cannot_be_compared_early_is_still_one_line(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = PROTOTYPES.replace("Prototypes", "FromFile")
    assert start(line) == 0
    before = (tmp_path / "r" / "config.yaml").read_bytes()
    capsys.readouterr()
    assert start(line.replace("}", ", rows: 5}"), *GO_ON) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("m2-train: run.name=r: its checkpoint does not fit: size mismatch for objectives.mine.table")
    assert said.endswith("; give another run.name")
    assert (tmp_path / "r" / "config.yaml").read_bytes() == before


def test_a_run_that_ends_before_its_first_step_stays_as_it_was(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no more memory")

    assert start() == 0
    before = (tmp_path / "r" / "config.yaml").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(PretrainModule, "training_step", fail)
        assert start(*GO_ON) == 1
    assert (tmp_path / "r" / "config.yaml").read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr(PretrainModule, "on_train_batch_end", fail)
        assert start(*GO_ON) == 1
    assert read_config(tmp_path / "r" / "config.yaml")["trainer"]["max_steps"] == 3


def test_a_sweep_refuses_a_job_before_the_first_one_starts(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("run.name=r-seed=1") == 0
    capsys.readouterr()
    assert start("-m", "seed=0,1", "optimizer=muon", *GO_ON) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("m2-train: optimizer._target_=m2_encoder.training.optim.build_muon: must be ")
    assert not (tmp_path / "r-seed=0").exists()


def test_a_sweep_goes_on_with_no_run_that_has_other_settings(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("run.name=r-seed=1", "seed=1") == 0
    before = (tmp_path / "r-seed=1" / "config.yaml").read_bytes()
    capsys.readouterr()
    assert start("-m", "seed=0,1", "trainer.max_steps=3") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    folder = tmp_path / "r-seed=1"
    assert line.startswith(f"m2-train: run.name=r-seed=1: {folder} holds a run with other settings: ")
    assert "trainer.max_steps: 2 then, 3 now" in line
    assert line.endswith("; give another run.name, or run.resume=auto to go on with it")
    assert (folder / "config.yaml").read_bytes() == before
    assert not (tmp_path / "r-seed=0").exists()


@pytest.mark.slow
def test_a_sweep_starts_again_where_jobs_are_finished(start: Start, tmp_path: Path) -> None:
    assert start("run.name=r-seed=1", "seed=1") == 0
    assert start("-m", "seed=0,1", "run.resume=auto", "evaluation=[]") == 0
    assert (tmp_path / "r-seed=0" / "checkpoints" / "last.ckpt").is_file()


def test_a_finished_run_is_evaluated_again_and_nothing_else(
    start: Start, refuse: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start() == 0
    before = (tmp_path / "r" / "config.yaml").read_bytes()
    last = tmp_path / "r" / "checkpoints" / "last.ckpt"
    assert refuse("optimizer.lr=0.02", *GO_ON) == (
        "optimizer.lr=0.02: is 0.001 in the run that is continued, whose checkpoint decides; leave it out, or start "
        f"another run from these weights: run.name=NEW model.weights={last} optimizer.lr=0.02"
    )
    assert refuse("objective.itc.label_smoothing=0.1", "run.resume=auto") == (
        "objective.itc.label_smoothing=0.1: changes nothing, as all 2 steps are done; it was 0.0; leave it out, or "
        "train on with trainer.max_steps above 2"
    )
    capsys.readouterr()
    assert start("run.resume=auto", "evaluation=[]") == 0
    assert "all 2 steps are done already; evaluating again" in capsys.readouterr().out
    assert (tmp_path / "r" / "config.yaml").read_bytes() == before


def test_fewer_steps_than_are_done(start: Start, refuse: Any) -> None:
    assert start("run.checkpoint_every=1") == 0
    assert refuse("trainer.max_steps=1", "run.checkpoint_every=1", "run.resume=auto") == (
        "trainer.max_steps=1: must be 2 or more: so many steps are done already; leave it out; for the model of an "
        "earlier one, m2-export run.name=r checkpoint=step=1"
    )


def test_the_numbers_of_the_model_are_recorded(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("run.export=true") == 0
    path = tmp_path / "r" / "config.yaml"
    recorded = read_config(path)
    model = recorded["model"]
    assert (model["embed_dim"], model["num_vl_layers"], model["vocab_size"]) == (64, 1, 3500)
    config = build_model_config(model)
    assert model["num_parameters"] == sum(each.numel() for each in M2Encoder(config).parameters())
    assert None not in [model[name] for name in config.to_dict()]
    # A run of an earlier version has nulls there, and is the same.
    path.write_text(path.read_text().replace("num_vl_layers: 1", "num_vl_layers: null"))
    capsys.readouterr()
    assert start(*GO_ON) == 0
    assert "changed since its last start: scheduler.max_steps: 2 then, 3 now; trainer.max_steps: 2 then, 3 now\n" in (
        capsys.readouterr().out
    )
    assert read_config(path)["model"] == model


@pytest.mark.parametrize(
    ("line", "sizes"), [("model.embed_dim=32", (32, 64, 3500)), ("model.name=m2-encoder-0.4b", (768, 768, 115244))]
)
def test_a_repetition_may_have_another_size(
    start: Start, tmp_path: Path, line: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start() == 0
    given: list[dict[str, Any]] = []
    monkeypatch.setattr("m2_encoder.runs.run.train", given.append)
    folder = str(tmp_path / "r")
    monkeypatch.setattr(sys, "argv", ["m2-train", "--config-path", folder, "--config-name", "config", line])
    assert train_command.main() == 0
    model = build_model_config(given[0]["model"])
    assert (model.embed_dim, model.feature_dim, model.vocab_size) == sizes
    assert given[0]["run"]["name"] == "r-2"


def test_a_validation_that_was_cut_short_is_made_up_for(start: Start, tmp_path: Path) -> None:
    lines = ("trainer.limit_val_batches=1", "trainer.val_check_interval=2", "run.checkpoint_every=1", "evaluation=[]")
    lines += ("trainer.max_steps=3", "+callbacks.fail._target_=tests.support.failing.FailInValidation")
    assert start(*lines, "+callbacks.fail.step=2") == 1
    assert start(*lines, "+callbacks.fail.step=0", "run.resume=auto") == 0
    assert start(*lines, "+callbacks.fail.step=0", "run.name=whole") == 0
    parts, whole = (_values(tmp_path / name / "metrics.jsonl") for name in ("r", "whole"))
    assert any(name.startswith("val/") for name in whole[1])
    assert parts == whole


def _values(path: Path) -> list[dict[str, float]]:
    """The lines of a log, but for times."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def test_the_newest_whole_checkpoint_counts(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start("run.checkpoint_every=1") == 0
    folder = tmp_path / "r" / "checkpoints"
    last, second = folder / "last.ckpt", folder / "step=2.ckpt"
    expected = torch.load(second, weights_only=True)["state_dict"]
    content = bytearray(second.read_bytes())
    content[int(len(content) * 0.9)] ^= 1  # in the optimizer's state
    last.unlink()
    last.mkdir()
    second.write_bytes(content)
    capsys.readouterr()
    assert start("run.checkpoint_every=1", "run.resume=must") == 0
    out = capsys.readouterr().out
    assert f"step=1.ckpt is the newest whole checkpoint ({last} is no file; and 1 more)" in out
    assert "continuing at step 1 of 2" in out
    found = torch.load(last, weights_only=True)["state_dict"]
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert list(folder.glob("last.ckpt.*.aside"))


def test_a_run_that_ended_early_is_exported_as_such_and_goes_on(
    start: Start, refuse: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[RunEnd] = []
    nothing = Results({}, (), tmp_path, 0)
    monkeypatch.setattr("m2_encoder.runs.run.report_run", lambda *_, end, **__: given.append(end) or nothing)
    assert start("+trainer.max_time={microseconds: 1}", "run.export=true") == 0
    assert given == [RunEnd(1, 2, "trainer.max_time")]
    card = (tmp_path / "r" / "export" / "README.md").read_text()
    assert "- steps · 步数: 1 of 2, ended early (trainer.max_time)" in card
    for path in (tmp_path / "r" / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    assert f"{tmp_path / 'r' / 'checkpoints'}: no whole checkpoint (" in refuse(*GO_ON)
    shutil.rmtree(tmp_path / "r" / "checkpoints")  # as if nothing had been saved
    assert start("run.resume=auto") == 0
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
