"""Training checkpoints in a run's folder: what they hold, and which is the newest whole one."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from m2_encoder.checkpoints.digests import check_zip
from m2_encoder.errors import CheckpointError

CHECKPOINT_FOLDER: Final = "checkpoints"
LAST_NAME: Final = "last.ckpt"

AVERAGE_KEY: Final = "average"
"""Of a checkpoint with a moving average: its `weights`, whole, fp32 at least, and whether they were `validated`."""


class Newest(NamedTuple):
    """The newest whole checkpoint of a run."""

    path: Path
    step: int  # optimizer steps that it has done
    passed: tuple[str, ...]  # why newer ones, or `last.ckpt`, do not count, a line each


def read_content(checkpoint: Path) -> dict[str, Any]:
    """What a training checkpoint holds, its tensors without their values, which are not read.

    Raises:
        CheckpointError: if the file is damaged or something else.
    """
    try:
        content = torch.load(checkpoint, map_location="meta", weights_only=True, mmap=True)
        return {**content, "global_step": int(content["global_step"]), "state_dict": dict(content["state_dict"])}
    except Exception as error:  # torch raises a dozen unrelated types for broken and hostile input
        raise CheckpointError(
            f"{checkpoint}: no training checkpoint, or a damaged one; start again with another run.name"
        ) from error


def read_step(checkpoint: Path) -> int:
    """Optimizer steps that a training checkpoint has done; its tensors are not read.

    Raises:
        CheckpointError: if the file is damaged or something else.
    """
    return int(read_content(checkpoint)["global_step"])


def read_average(checkpoint: Path, *, final: str) -> dict[str, Tensor]:
    """What stands in the place of trained weights, by names of the training module, where `run.final` wants that.

    That is the moving average with `final="ema"`, and with `"best"` where it was the average that was validated.

    Raises:
        CheckpointError: if the average is wanted, and there is none.
    """
    if final not in ("ema", "best"):
        return {}
    average = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True).get(AVERAGE_KEY)
    if average is None and final == "ema":
        raise CheckpointError(f"{checkpoint}: holds no average of the weights; callbacks=[default,ema] keeps one")
    is_taken = average is not None and (final == "ema" or average["validated"])
    return dict(average["weights"]) if is_taken else {}


def find_newest(folder: Path) -> Newest | None:
    """The checkpoint with the most steps whose bytes are whole, whatever its name; None where there is none at all.

    Only reads, so that all ranks find the same. The bytes of the one that is taken are read once, and of newer ones.

    Raises:
        CheckpointError: if there are checkpoints, but no whole one.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is no folder; move it away, or give another run.name")
    found, unread = _candidates(folder)
    damaged: list[str] = []
    for step, path in sorted(found, key=lambda each: (each[0], each[1].name == LAST_NAME), reverse=True):
        try:
            check_zip(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        missing = [] if (folder / LAST_NAME).exists() else [f"{LAST_NAME} is missing"]
        newer = [reason for number, reason in unread if number > step]
        return Newest(path, step, (*missing, *newer, *damaged))
    if reasons := [reason for _, reason in unread] + damaged:
        more = f", and {len(reasons) - 1} more" if len(reasons) > 1 else ""
        raise CheckpointError(f"{folder}: no whole checkpoint ({reasons[0][:300]}{more}); give another run.name")
    return None


def _candidates(folder: Path) -> tuple[list[tuple[int, Path]], list[tuple[float, str]]]:
    """Steps and paths of what can be opened, each file once; and why the rest cannot, by the step in its name."""
    found: dict[tuple[int, int], tuple[int, Path]] = {}
    unread: list[tuple[float, str]] = []
    # Partial files begin with a dot. `last.ckpt` is another name of one of the others, and the one that is kept.
    paths = [path for path in folder.glob("*.ckpt") if not path.name.startswith(".")] if folder.is_dir() else []
    for path in sorted(paths, key=lambda path: (path.name != LAST_NAME, path.name)):
        named = re.fullmatch(r"step=(\d+)\.ckpt", path.name)
        number = float(named[1]) if named else math.inf
        if not path.is_file():
            unread.append((number, f"{path} is no file"))
            continue
        status = path.stat()
        if (status.st_dev, status.st_ino) in found:
            continue
        try:
            found[status.st_dev, status.st_ino] = (read_step(path), path)
        except CheckpointError:
            unread.append((number, f"{path} is no training checkpoint, or a damaged one"))
    return list(found.values()), unread
