"""The model of a run at one of its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from m2_encoder.checkpoints.training_state import CHECKPOINT_FOLDER, find_newest
from m2_encoder.config.model_choice import build_tokenizer
from m2_encoder.config.schema import is_foreign
from m2_encoder.config.trusted import refuse_foreign
from m2_encoder.data.images.transforms import EvalTransform
from m2_encoder.errors import UserError
from m2_encoder.hub import LoadedModel
from m2_encoder.pictures import STANDARD, PicturePolicy, read_policy
from m2_encoder.runs.export import read_trained
from m2_encoder.runs.folder import CONFIG_FILE, read_config


def find_checkpoint(folder: Path, named: str) -> Path | None:
    """A checkpoint of a run: `last` is the newest whole one; a step, a name with or without suffix, or a path.

    Raises:
        CheckpointError: if `last` is asked for and none is whole.
    """
    inside = folder / CHECKPOINT_FOLDER
    if named == "last":
        newest = find_newest(inside)
        return newest.path if newest is not None else None
    name = f"step={named}" if named.isdecimal() else named
    for path in (inside / f"{name}.ckpt", inside / name, Path(named).expanduser()):
        if path.is_file():
            return path
    return None


def load_checkpoint(
    folder: object,
    checkpoint: str | int | os.PathLike[str],
    *,
    pictures: PicturePolicy | str | Mapping[str, str] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> LoadedModel:
    """The model of the run in `folder` at a checkpoint; `m2_encoder.load` explains the arguments.

    Raises:
        UserError: if there is no such run or checkpoint, it is damaged, or the run trained no encoder.
    """
    place = Path(folder).expanduser() if isinstance(folder, str | os.PathLike) else None
    if place is None or not (place / CONFIG_FILE).is_file():
        raise UserError(f"checkpoint={checkpoint!r} needs the folder of a run, and {folder!r:.80} has no {CONFIG_FILE}")
    cfg = read_config(place / CONFIG_FILE)
    if cfg.get("task") is not None:
        raise UserError(f"{place}: the run trained no encoder but what task= names")
    if is_foreign(cfg["model"]):
        rule = "the run trained somebody else's model, which its own code builds"
        raise UserError(f"{place}: {rule}; `m2-export run.name={place.name} --config-dir FOLDER` writes its weights")
    refuse_foreign({"adaptation": cfg.get("adaptation")})
    path = find_checkpoint(place, os.fspath(checkpoint) if isinstance(checkpoint, os.PathLike) else str(checkpoint))
    if path is None:
        found = sorted((place / CHECKPOINT_FOLDER).glob("step=*.ckpt"), key=lambda each: (len(each.name), each.name))
        names = ", ".join([each.stem for each in found][-10:]) or "none"
        raise UserError(f"{place}: no checkpoint {str(checkpoint)!r}; there is {names}")
    model = read_trained(cfg, path).to(device=device, dtype=dtype)
    policy = read_policy(pictures if pictures is not None else cfg["model"].get("pictures") or STANDARD)
    tokenizer = build_tokenizer(cfg["model"], model.config)
    return LoadedModel(model, EvalTransform(model.config.image_size, pictures=policy), tokenizer)
