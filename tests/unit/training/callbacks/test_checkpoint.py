"""When states are saved, and what stands in the folder afterwards; whole runs are in tests/integration."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback

from m2_encoder.errors import CheckpointError, UserError
from m2_encoder.training.callbacks.checkpoint import AtomicCheckpointIO, RunCheckpoint
from tests.support.training import LIGHTNING_WARNINGS, make_datamodule, make_module, make_trainer

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fit(emoji_folder: Path, checkpoint: RunCheckpoint, *callbacks: Callback, **trainer: Any) -> lightning.Trainer:
    built = make_trainer(checkpoint.folder.parent, callbacks=[checkpoint, *callbacks], **{"max_steps": 3, **trainer})
    built.fit(make_module(), datamodule=make_datamodule(emoji_folder, global_batch_size=4))
    return built


@pytest.mark.parametrize(
    ("every", "steps", "expected"),
    [(1, 2, [1, 2]), (2, 3, [2, 3]), (3, 3, [3]), (100, 3, [3])],
)
def test_the_last_step_is_always_saved(
    emoji_folder: Path, tmp_path: Path, every: int, steps: int, expected: list[int]
) -> None:
    checkpoint = RunCheckpoint(folder=tmp_path / "checkpoints", every_n_steps=every)
    fit(emoji_folder, checkpoint, max_steps=steps)
    assert names(checkpoint.folder) == ["last.ckpt", *(f"step={step}.ckpt" for step in expected)]
    assert torch.load(checkpoint.last, weights_only=True)["global_step"] == steps


def test_a_run_that_is_stopped_saves_its_last_step(emoji_folder: Path, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 2

    checkpoint = RunCheckpoint(folder=tmp_path / "checkpoints", every_n_steps=100)
    fit(emoji_folder, checkpoint, Stop(), max_steps=9)
    assert names(checkpoint.folder) == ["last.ckpt", "step=2.ckpt"]
    # It continues as any other.
    again = RunCheckpoint(folder=checkpoint.folder, every_n_steps=100)
    trainer = make_trainer(tmp_path, max_steps=5, callbacks=[again])
    datamodule = make_datamodule(emoji_folder, global_batch_size=4)
    trainer.fit(make_module(), datamodule=datamodule, ckpt_path=again.last, weights_only=True)
    assert trainer.global_step == 5
    state = torch.load(again.last, weights_only=True)
    assert state["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["position"] == 5 * 4


def test_a_try_run_keeps_nothing(emoji_folder: Path, tmp_path: Path) -> None:
    checkpoint = RunCheckpoint(folder=tmp_path / "checkpoints", every_n_steps=1)
    fit(emoji_folder, checkpoint, fast_dev_run=1)
    assert not checkpoint.folder.exists()


def test_a_disk_without_links_gets_a_copy(emoji_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    checkpoint = RunCheckpoint(folder=tmp_path / "checkpoints", every_n_steps=2)
    fit(emoji_folder, checkpoint)
    assert not checkpoint.last.samefile(checkpoint.folder / "step=3.ckpt")
    assert checkpoint.last.read_bytes() == (checkpoint.folder / "step=3.ckpt").read_bytes()


def test_random_states_of_another_number_of_ranks_are_not_used_and_that_is_said(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = RunCheckpoint(folder=tmp_path, every_n_steps=1)
    trainer = make_trainer(tmp_path)
    states = [{"cpu": torch.random.get_rng_state()} for _ in range(2)]
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    checkpoint.on_load_checkpoint(trainer, make_module(), {"random_states": states, "global_step": 4})
    with caplog.at_level(logging.WARNING):
        checkpoint.on_train_start(trainer, make_module())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert "saved by 2 ranks, continued by 1" in caplog.text
    caplog.clear()
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    checkpoint.on_load_checkpoint(trainer, make_module(), {"random_states": states, "global_step": 4})
    checkpoint.on_train_start(trainer, make_module())
    assert not caplog.text, "the first rank says it for all"


def test_an_own_way_of_writing_is_respected(tmp_path: Path) -> None:
    class Own(TorchCheckpointIO):
        pass

    for given, expected in ((None, AtomicCheckpointIO), (Own(), Own)):
        trainer = make_trainer(tmp_path, plugins=[given] if given else None)
        RunCheckpoint(folder=tmp_path, every_n_steps=1).setup(trainer, make_module(), "fit")
        assert type(trainer.strategy.checkpoint_io) is expected


def test_a_longer_schedule_takes_effect_at_the_first_step(emoji_folder: Path, tmp_path: Path) -> None:
    class Rates(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.seen.append(optimizer.param_groups[0]["lr"])

    def rates(folder: Path, planned: int, *, steps: int, resume: Path | None = None) -> list[float]:
        seen = Rates()
        checkpoint = RunCheckpoint(folder=folder, every_n_steps=2)
        trainer = make_trainer(folder, max_steps=steps, callbacks=[checkpoint, seen])
        datamodule = make_datamodule(emoji_folder, global_batch_size=4)
        trainer.fit(make_module(max_steps=planned), datamodule=datamodule, ckpt_path=resume, weights_only=True)
        return seen.seen

    expected = rates(tmp_path / "whole", 5, steps=5)
    assert len(set(expected)) > 3
    rates(tmp_path / "begun", 2, steps=2)  # whose schedule ends at 0
    assert rates(tmp_path / "begun", 5, steps=5, resume=tmp_path / "begun" / "last.ckpt") == expected[2:]


class TestAtomicCheckpointIO:
    def test_a_failure_while_writing_leaves_the_old_file_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "new" / "last.ckpt"
        io = AtomicCheckpointIO()
        io.save_checkpoint({"a": 1}, path)

        def full(content: object, target: Path) -> None:
            Path(target).write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(CheckpointError, match=r"cannot write .*last\.ckpt.*No space left"):
            io.save_checkpoint({"a": 2}, path)
        assert names(path.parent) == ["last.ckpt"]
        assert io.load_checkpoint(path, weights_only=True) == {"a": 1}

    def test_nothing_is_written_outside_of_the_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Lightning writes to the machine's temporary folder first, which may be another, smaller disk.
        monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
        AtomicCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "x.ckpt")
        assert names(tmp_path) == ["x.ckpt"]


@pytest.mark.parametrize("value", [0, -1])
def test_an_impossible_interval_is_named(tmp_path: Path, value: int) -> None:
    with pytest.raises(UserError, match=f"every_n_steps={value}"):
        RunCheckpoint(folder=tmp_path, every_n_steps=value)
