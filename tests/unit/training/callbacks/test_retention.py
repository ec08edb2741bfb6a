"""Which checkpoints stay: the last few and one of every so many steps, and nothing of before under other settings."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from m2_encoder.checkpoints.training_state import find_newest
from m2_encoder.errors import CheckpointError
from m2_encoder.training.callbacks import checkpoint as subject
from m2_encoder.training.callbacks.checkpoint import RunCheckpoint
from tests.support.training import LIGHTNING_WARNINGS, make_datamodule, make_module, make_trainer

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]


def fit(emoji_folder: Path, folder: Path, *, steps: int, resumes: bool = False, **settings: Any) -> list[int]:
    """Steps of the checkpoints that are there in the end."""
    keeper = RunCheckpoint(folder=folder, **{"every_n_steps": 1, **settings})
    trainer = make_trainer(folder.parent, max_steps=steps, callbacks=[keeper])
    newest = find_newest(folder) if resumes else None
    datamodule = make_datamodule(emoji_folder, global_batch_size=4)
    trainer.fit(make_module(), datamodule=datamodule, ckpt_path=newest and newest.path, weights_only=True)
    return steps_in(folder)


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.stem.partition("=")[2]) for path in folder.glob("step=*.ckpt"))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 2, 3, 4, 5, 6, 7]),
        ({"keep_last": 2}, [6, 7]),
        ({"keep_last": 1, "keep_every": 3, "every_n_steps": 2}, [4, 6, 7]),
    ],
)
def test_the_last_few_stay_and_one_of_every_so_many_steps(
    emoji_folder: Path, tmp_path: Path, settings: dict[str, Any], expected: list[int]
) -> None:
    folder = tmp_path / "checkpoints"
    assert fit(emoji_folder, folder, steps=7, **settings) == expected
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 7


def test_a_run_that_goes_on_counts_on(
    emoji_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, settings = tmp_path / "checkpoints", {"keep_last": 2, "keep_every": 3}
    assert fit(emoji_folder, folder, steps=4, **settings) == [3, 4]

    def kill(path: Path) -> None:
        raise KeyboardInterrupt  # between the new checkpoint and the end of an old one

    with monkeypatch.context() as patch, pytest.raises(SystemExit):  # noqa: PT012
        patch.setattr(subject, "delete", kill)
        fit(emoji_folder, folder, steps=9, resumes=True, **settings)
    assert steps_in(folder) == [3, 4, 5]
    assert fit(emoji_folder, folder, steps=8, resumes=True, **settings) == [3, 6, 7, 8]
    assert "stay" not in caplog.text


def test_files_of_other_settings_stay_and_that_is_said(
    emoji_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoints"
    fit(emoji_folder, folder, steps=3)
    (folder / "step=2.ckpt").write_bytes(b"a file of somebody")
    with caplog.at_level(logging.WARNING):
        assert fit(emoji_folder, folder, steps=6, resumes=True, keep_last=1) == [1, 2, 3, 6]
    assert "run.keep_last=1 counts from step 3 on; 3 checkpoints of before stay: step=1.ckpt to step=3.ckpt" in (
        caplog.text
    )
    caplog.clear()
    assert fit(emoji_folder, folder, steps=7, resumes=True, keep_last=1) == [1, 2, 3, 7]
    assert "stay" not in caplog.text, "said once"


def test_a_damaged_newest_one_leaves_the_one_before(emoji_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    fit(emoji_folder, folder, steps=4, keep_last=2)
    (folder / "step=4.ckpt").write_bytes(b"")  # last.ckpt is the same file
    newest = find_newest(folder)
    assert newest is not None
    assert newest.step == 3
    assert fit(emoji_folder, folder, steps=6, resumes=True, keep_last=2) == [5, 6]


def test_nothing_is_deleted_where_the_new_one_cannot_be_written(
    emoji_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    fit(emoji_folder, folder, steps=2, keep_last=1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="No space left"):  # noqa: PT012
        patch.setattr(torch, "save", full)
        fit(emoji_folder, folder, steps=4, resumes=True, keep_last=1)
    assert steps_in(folder) == [2]
    assert fit(emoji_folder, folder, steps=4, resumes=True, keep_last=1) == [4]
