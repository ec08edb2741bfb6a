"""Which of a run's checkpoints is the newest whole one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from m2_encoder import CheckpointError
from m2_encoder.checkpoints.training_state import find_newest


def save(folder: Path, *steps: int) -> None:
    folder.mkdir(exist_ok=True)
    for step in steps:
        state = {"weight": torch.full((500,), float(step))}
        moments = [{"state": {0: torch.full((5000,), float(step))}}]
        content = {"global_step": step, "state_dict": state, "optimizer_states": moments}
        torch.save(content, folder / f"step={step}.ckpt")
    (folder / "last.ckpt").unlink(missing_ok=True)
    os.link(folder / f"step={max(steps)}.ckpt", folder / "last.ckpt")


def damage(path: Path) -> None:
    """Another file of that name, with a bit flipped in the optimizer's state."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)


def test_the_last_one(tmp_path: Path) -> None:
    assert find_newest(tmp_path / "absent") is None
    save(tmp_path, 3, 9, 12)
    found = find_newest(tmp_path)
    assert found == (tmp_path / "last.ckpt", 12, ())


def test_last_is_missing_or_older_or_a_folder(tmp_path: Path) -> None:
    save(tmp_path, 3)
    torch.save({"global_step": 10, "state_dict": {}}, tmp_path / "other.ckpt")  # whatever its name
    assert find_newest(tmp_path) == (tmp_path / "other.ckpt", 10, ())
    (tmp_path / "other.ckpt").unlink()
    (tmp_path / "last.ckpt").unlink()
    assert find_newest(tmp_path) == (tmp_path / "step=3.ckpt", 3, ("last.ckpt is missing",))
    (tmp_path / "last.ckpt").mkdir()
    assert find_newest(tmp_path) == (tmp_path / "step=3.ckpt", 3, (f"{tmp_path / 'last.ckpt'} is no file",))


def test_damaged_and_partial_ones_are_passed(tmp_path: Path) -> None:
    save(tmp_path, 3, 9)
    save(tmp_path, 12)
    (tmp_path / ".step=15.ckpt.01234567.tmp").write_bytes((tmp_path / "last.ckpt").read_bytes())
    (tmp_path / ".step=15.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes())
    damage(tmp_path / "step=12.ckpt")
    (tmp_path / "last.ckpt").unlink()
    (tmp_path / "last.ckpt").write_bytes((tmp_path / "step=9.ckpt").read_bytes()[:2000])
    (tmp_path / "step=3.ckpt").write_bytes(b"")  # older than the one that is taken: no word of it
    found = find_newest(tmp_path)
    assert found is not None
    assert (found.path.name, found.step) == ("step=9.ckpt", 9)
    assert [reason.partition(":")[0].split()[0] for reason in found.passed] == [
        str(tmp_path / "last.ckpt"),
        str(tmp_path / "step=12.ckpt"),
    ]
    assert "Bad CRC-32" in found.passed[1]


def test_none_is_whole(tmp_path: Path) -> None:
    save(tmp_path, 3, 4)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"no whole checkpoint \(.*, and 2 more\); give another run\.name"):
        find_newest(tmp_path)


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("x")
    with pytest.raises(CheckpointError, match="checkpoints: is no folder; move it away"):
        find_newest(tmp_path / "checkpoints")
