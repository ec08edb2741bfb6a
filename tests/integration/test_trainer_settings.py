"""What `trainer.…` says is what a run does, or it is refused before anything starts."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from m2_encoder.cli import train as train_command
from m2_encoder.config import compose, validate
from m2_encoder.config.overrides import put_last
from m2_encoder.config.paths import find_conf
from m2_encoder.config.problems import format_problem
from m2_encoder.runs.folder import read_config
from m2_encoder.training.module import PretrainModule
from tests.support.training import LIGHTNING_WARNINGS

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

SMALL = (
    "+experiment=smoke", "scheduler.warmup_steps=0", "data.global_batch_size=8", "logger=csv", "evaluation=[]",
    "run.export=false",
)  # fmt: skip
NO_VALIDATION = "trainer.limit_val_batches=0"
EPOCHS = ("trainer.max_steps=-1", "+trainer.limit_train_batches=4", "trainer.limit_val_batches=1")

LAST, EVEN = [8, 16], [6, 8, 14, 16]

Start = Callable[..., int]


@pytest.fixture
def start(repo_root: Path, emoji_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """`m2-train` in this process: a name, and settings."""
    monkeypatch.chdir(repo_root)
    places = (f"run.folder={tmp_path}", f"data.folder={emoji_folder}")

    def run(name: str, *lines: str) -> int:
        monkeypatch.setattr(sys, "argv", ["m2-train", *SMALL, *places, f"run.name={name}", *lines])
        return train_command.main()

    return run


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The samples of every step, by their keys and pixels."""
    batches: list[tuple[str, ...]] = []
    step = PretrainModule.training_step

    def note(self: PretrainModule, batch: Any, batch_idx: int) -> Any:
        batches.append((*batch.keys, str(batch.images.double().sum().item())))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(PretrainModule, "training_step", note)
    return batches


def _log(folder: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


def _steps(folder: Path, prefix: str) -> list[int]:
    return [int(line["step"]) for line in _log(folder) if any(name.startswith(prefix) for name in line)]


def _summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


def _state(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, weights_only=True))


def test_epochs_say_how_long_a_run_is_and_when_it_validates(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (*EPOCHS, "trainer.max_epochs=2", "trainer.val_check_interval=0.5")
    assert start("r", *lines) == 0
    folder = tmp_path / "r"
    assert (_steps(folder, "train/"), _steps(folder, "val/")) == (list(range(1, 9)), [2, 4, 6, 8])
    assert "run r: an epoch has 4 steps, 2 have 8\n" in capsys.readouterr().out
    recorded = read_config(folder / "config.yaml")
    assert (recorded["trainer"]["max_steps"], recorded["scheduler"]["max_steps"]) == (8, 8)
    assert _state(folder / "checkpoints" / "last.ckpt")["lr_schedulers"][0]["_last_lr"] == [0.0, 0.0, 0.0]
    assert (_summary(folder)["finished"], _summary(folder)["planned_steps"]) == (True, 8)
    cfg = compose_train(*lines, "run.name=r", f"run.folder={tmp_path}", "run.resume=auto")
    cfg["data"]["folder"] = recorded["data"]["folder"]
    assert train_command.is_done(cfg)
    assert not train_command.is_done({**cfg, "trainer": {**cfg["trainer"], "max_epochs": 3}})
    # One epoch more: the schedule is longer, and the run goes on.
    assert start("r", *EPOCHS, "trainer.max_epochs=3", "trainer.val_check_interval=1.0", "run.resume=auto") == 0
    assert (_steps(folder, "train/")[-1], _steps(folder, "val/")) == (12, [2, 4, 6, 8, 12])


@pytest.mark.slow
def test_a_run_goes_on_as_if_it_had_not_stopped_wherever_in_an_epoch(
    start: Start, tmp_path: Path, seen: list[tuple[str, ...]]
) -> None:
    kept = ("run.checkpoint_every=1", "run.keep_last=null")
    lines = (*EPOCHS, "trainer.max_epochs=2", "trainer.val_check_interval=1.0", *kept)
    assert start("whole", *lines, "model.drop_path_rate=0.5") == 0
    whole, batches = tmp_path / "whole", list(seen)
    for step in (3, 4, 6):
        other = tmp_path / f"r{step}"
        shutil.copytree(whole, other)
        for path in (other / "checkpoints").iterdir():
            if path.name != f"step={step}.ckpt":
                path.unlink()
        if step == 6:
            _make_old(other / "checkpoints" / "step=6.ckpt", step)
        seen.clear()
        assert start(other.name, *lines, "model.drop_path_rate=0.5", "run.resume=must") == 0
        assert seen == batches[step:]
        assert _log(other) == _log(whole)
        expected, found = (_state(folder / "checkpoints" / "last.ckpt") for folder in (whole, other))
        assert all(torch.equal(found["state_dict"][name], value) for name, value in expected["state_dict"].items())
        assert found["epoch"] == expected["epoch"]


def _make_old(path: Path, step: int) -> None:
    """As of earlier versions, which knew of one epoch, as long as the run."""
    content = _state(path)
    loops = content["loops"]["fit_loop"]
    counts = {"ready": step, "started": step, "processed": step, "completed": step - 1}
    loops["epoch_loop.batch_progress"] = {"total": counts, "current": dict(counts), "is_last_batch": False}
    counts = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    loops["epoch_progress"] = {"total": counts, "current": dict(counts)}
    torch.save(content, path)


def test_overfitting_sees_the_same_batches_and_gives_a_verdict(
    start: Start, seen: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("r", "+trainer.overfit_batches=2", "trainer.max_steps=5", "trainer.val_check_interval=100") == 0
    assert seen == [*seen[:2], *seen[:2], seen[0]]
    assert seen[0] != seen[1]
    out = capsys.readouterr().out
    assert "overfit: the loss of 2 batch(es) went from 2." in out
    assert "0.347 is there always, as images have several captions: not near zero" in out


@pytest.mark.slow
def test_limited_epochs_see_new_batches(start: Start, seen: list[tuple[str, ...]]) -> None:
    lines = ("+trainer.limit_train_batches=2", "trainer.max_steps=5", NO_VALIDATION)
    assert start("r", *lines, "+trainer.reload_dataloaders_every_n_epochs=1") == 0
    reloaded, seen[:] = list(seen), []
    assert start("s", *lines) == 0
    assert seen == reloaded
    assert len(set(seen)) == 5


def test_a_dev_run_leaves_nothing_and_blocks_nothing(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("r", "+trainer.fast_dev_run=2", "run.export=true") == 0
    assert "run r: debug run: 2 step(s) and validation went through\n" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"debug"}
    assert {path.name for path in (tmp_path / "debug" / "r").iterdir()} == {".hydra"}
    assert start("r", "trainer.max_steps=1", NO_VALIDATION) == 0
    before = _content(tmp_path / "r")
    assert start("r", "debug=fast", "run.resume=auto") == 0
    assert _content(tmp_path / "r") == before


@pytest.mark.slow
def test_a_debug_run_is_replaced_by_the_next_and_never_counts(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ("debug=limit", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "run.export=true")
    assert start("r", *lines) == 0
    folder = tmp_path / "debug" / "r"
    assert (_summary(folder)["finished"], _summary(folder)["ended_by"]) == (False, "a debug run")
    assert (_steps(folder, "train/"), _steps(folder, "val/")) == ([1, 2, 3, 4], [2, 4])
    assert not (folder / "export").exists()
    assert "the next debug run replaces it" in capsys.readouterr().out
    (folder / "mine").mkdir()
    assert start("r", *lines, "trainer.max_epochs=1") == 0
    assert (_steps(folder, "train/"), (folder / "mine").exists()) == ([1, 2], False)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("debug: true", "debug: false"))
    capsys.readouterr()
    assert start("r", *lines) == 2
    assert "holds a run that is no debug run" in capsys.readouterr().err


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_time_ends_a_start_and_the_next_one_goes_on(start: Start, tmp_path: Path) -> None:
    lines = ("trainer.max_steps=9", "+trainer.max_time={microseconds: 1}", NO_VALIDATION)
    assert start("r", *lines) == 0
    assert (_summary(tmp_path / "r")["finished"], _summary(tmp_path / "r")["ended_by"]) == (False, "trainer.max_time")
    assert start("r", *lines, "run.resume=auto") == 0
    assert _steps(tmp_path / "r", "train/") == [1, 2]
    assert [line["step"] for line in _log(tmp_path / "r")] == [1, 2]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["+trainer.barebones=true"], "trainer.barebones=true: must be false: a run writes metrics.jsonl"),
        (
            ["+trainer.accumulate_grad_batches=2"],
            "trainer.accumulate_grad_batches=2: must be 1: strategy.micro_batches",
        ),
        (["+trainer.min_steps=30"], "trainer.min_steps=30: must not exceed trainer.max_steps=20"),
        (["trainer.max_epochs=1", "+trainer.min_epochs=2"], "trainer.min_epochs=2: must not exceed"),
        (["trainer.max_steps=-1"], "trainer.max_steps=-1: must end somewhere"),
        (["trainer.max_epochs=0"], "trainer.max_epochs=0: must be a whole number, 1 or more, or -1"),
        (["+trainer.limit_train_batches=0"], "trainer.limit_train_batches=0: must be a number of batches in 1.."),
        (["+trainer.fast_dev_run=-1"], "trainer.fast_dev_run=-1: must be true, false, or a number of batches"),
        (["+trainer.gradient_clip_algorithm=all"], "trainer.gradient_clip_algorithm=all: must be one of norm, value"),
        (["trainer.compile=true", "strategy=grouped_fsdp"], "trainer.compile=true: is not proven with strategy"),
        (["trainer.compile=true", "+experiment=visual_tokenizer"], "trainer.compile=true: has no meaning here"),
    ],
)
def test_what_cannot_be_is_refused_by_name(lines: list[str], said: str) -> None:
    base = [] if any("experiment" in line for line in lines) else ["+experiment=smoke"]
    with compose.open_composer(find_conf(), "train") as composer:
        composition = composer.compose([*base, "run.resume=auto", *lines])
        problems = [*composition.problems, *validate.validate_train(composition.cfg)]
        (problem,) = composition.without_echoes(problems)
    assert format_problem(problem).startswith(said)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            ["trainer.check_val_every_n_epoch=1", "trainer.val_check_interval=5", "+trainer.limit_train_batches=4"],
            "trainer.val_check_interval=5: must not exceed the 4 steps of an epoch, with check_val_every_n_epoch=1; "
            "use trainer.val_check_interval=1.0, or check_val_every_n_epoch=null to count through",
        ),
        (
            ["+trainer.limit_train_batches=0.0001"],
            "trainer.limit_train_batches=0.0001: leaves nothing of the 504 steps of an epoch; give a number of steps, "
            "for example limit_train_batches=1",
        ),
        (
            ["trainer.max_epochs=1", *EPOCHS, "scheduler.warmup_steps=5"],
            "scheduler.warmup_steps=5: must be in 0..trainer.max_steps=4; for example scheduler.warmup_steps=0",
        ),
    ],
)  # fmt: skip
def test_what_the_length_of_an_epoch_rules_out(
    start: Start, tmp_path: Path, lines: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("r", *lines) == 2
    assert capsys.readouterr().err == f"m2-train: {said}\n"
    assert {path.name for path in (tmp_path / "r").iterdir()} <= {".hydra"}


def compose_train(*lines: str) -> dict[str, Any]:
    with compose.open_composer(find_conf(), "train") as composer:
        composition = composer.compose(put_last([*SMALL, *lines]))
    assert not composition.problems
    return composition.cfg


def test_a_debug_run_counts_more_than_an_experiment_and_less_than_a_value() -> None:
    for lines in (("debug=limit", "trainer.max_epochs=3"), ("trainer.max_epochs=3", "+debug=limit")):
        cfg = compose_train(*lines)
        trainer = cfg["trainer"]
        assert (trainer["max_steps"], trainer["max_epochs"], trainer["limit_train_batches"]) == (-1, 3, 10)
        assert cfg["run"]["checkpoint_every"] == 5
    assert "limit_train_batches" not in compose_train("debug=null")["trainer"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "trained", "validated"),
    [
        ("trainer.val_check_interval=7", 20, [7, 14]),
        ("trainer.val_check_interval=0.25 +trainer.limit_train_batches=8", 20, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]),
        ("trainer.check_val_every_n_epoch=2 trainer.val_check_interval=1.0 +trainer.limit_train_batches=4", 20, LAST),
        ("trainer.check_val_every_n_epoch=2 trainer.val_check_interval=2 +trainer.limit_train_batches=4", 20, EVEN),
        ("trainer.num_sanity_val_steps=2 trainer.val_check_interval=10", 20, [10, 20]),
        ("trainer.num_sanity_val_steps=-1", 20, [0, 10, 20]),
        ("trainer.max_epochs=1 +trainer.limit_train_batches=0.01", 5, []),
        ("trainer.log_every_n_steps=5 trainer.limit_val_batches=0", 4, []),
        ("trainer.deterministic=true +trainer.detect_anomaly=true +trainer.benchmark=false", 20, [10, 20]),
        ("+trainer.enable_progress_bar=false trainer.enable_model_summary=true", 20, [10, 20]),
        ("+trainer.enable_checkpointing=false", 20, [10, 20]),
        ("trainer.gradient_clip_val=null", 20, [10, 20]),
    ],
)  # fmt: skip
def test_each_setting_by_itself(start: Start, tmp_path: Path, option: str, trained: int, validated: list[int]) -> None:
    given = option.split()
    known = [line for line in given if "limit_val" in line]
    assert start("r", *(known or ["trainer.limit_val_batches=1"]), *(line for line in given if line not in known)) == 0
    assert len(_steps(tmp_path / "r", "train/")) == trained
    assert _steps(tmp_path / "r", "val/") == validated
    assert (tmp_path / "r" / "checkpoints").is_dir() != ("checkpointing" in option)


@pytest.mark.slow
def test_a_debug_run_learns_a_few_batches_by_heart(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    assert start("r", "debug=overfit", "trainer.overfit_batches=1", "trainer.max_epochs=150") == 0
    assert "it fell near zero" in capsys.readouterr().out


@pytest.mark.slow
def test_anomalies_are_found_where_they_arise(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    step = PretrainModule.training_step

    def spoil(self: PretrainModule, batch: Any, batch_idx: int) -> Any:
        return step(self, batch, batch_idx) + 0 * (self.model.logit_scale - self.model.logit_scale.detach()).sqrt()

    monkeypatch.setattr(PretrainModule, "training_step", spoil)
    assert start("r", "+trainer.detect_anomaly=true", NO_VALIDATION) == 1
    assert start("s", "trainer.max_steps=2", NO_VALIDATION) == 0  # steps that are not finite are skipped and counted
