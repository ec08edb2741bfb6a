"""Which file a path of weights means: a file, an index of several, or the folder of an export or of a run."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Final

from torch import Tensor

from m2_encoder.checkpoints.digests import check_zip
from m2_encoder.checkpoints.exported import CONFIG_FILE, VISUAL_TOKENIZER_FORMAT, WEIGHTS_FILE, read_format
from m2_encoder.checkpoints.formats import file_kind, read_safetensors, read_small_json, read_torch
from m2_encoder.checkpoints.state_names import unwrap
from m2_encoder.checkpoints.training_state import CHECKPOINT_FOLDER, find_newest
from m2_encoder.errors import CheckpointError

_NAMES: Final = (
    WEIGHTS_FILE,
    f"{WEIGHTS_FILE}.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""In a folder, what is taken, the first that is there."""

_SHARD: Final = re.compile(r"-\d{5}-of-\d{5}\.\w+$")
_LOGGER = logging.getLogger(__name__)


def find_weights(path: str | os.PathLike[str]) -> Path:
    """The file behind a path: itself, or what a folder of an export, of transformers or of a run holds.

    Of a run the newest whole checkpoint counts, and its export where it kept none.

    Raises:
        CheckpointError: for a folder without weights of an encoder.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    if VISUAL_TOKENIZER_FORMAT in (read_format(path), read_format(path / "export")):
        raise CheckpointError(f"{path}: is of a visual tokenizer, not of an encoder; give the folder of an encoder")
    found = next((path / name for name in _NAMES if (path / name).is_file()), None)
    if found is None and (path / CHECKPOINT_FOLDER).is_dir():
        newest = find_newest(path / CHECKPOINT_FOLDER)
        found = None if newest is None else newest.path
    if found is None and (path / "export" / WEIGHTS_FILE).is_file():
        found = path / "export" / WEIGHTS_FILE
    if found is None:
        raise CheckpointError(
            f"{path}: is a folder without weights; give a checkpoint, a folder of m2-export with {WEIGHTS_FILE} and "
            f"{CONFIG_FILE}, or a run's folder with {CHECKPOINT_FOLDER}"
        )
    _LOGGER.info("the weights of %s are read from %s", path, found)
    return found


def read_index(path: Path) -> dict[str, Tensor]:
    """The tensors of an index, from the files beside it that it names.

    Raises:
        CheckpointError: if it is no index, a file is missing or damaged, or holds other tensors than the index says.
    """
    places = read_small_json(path).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(
            f"{path}: not a checkpoint, but JSON without weight_map (name of a tensor to name of its file); "
            "give a checkpoint"
        )
    files = sorted(set(places.values()))
    if outside := [name for name in files if Path(name).name != name or name in ("", ".", "..")]:
        raise CheckpointError(f"{path}: names {outside[0][:120]!r}, which is no file beside it; correct the index")
    if missing := [name for name in files if not (path.parent / name).is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{path}: {missing[0][:120]}{more} of its {len(files)} files missing in {path.parent}; copy them there"
        )
    state: dict[str, Tensor] = {}
    for name in files:
        tensors = _read_shard(path.parent / name)
        wanted = {tensor for tensor, place in places.items() if place == name}
        if different := sorted(wanted ^ tensors.keys()):
            lacks = "lacks" if different[0] in wanted else "holds more than the index says:"
            raise CheckpointError(f"{path.parent / name}: {lacks} {different[0][:120]}; copy index and files again")
        state |= tensors
    return state


def _read_shard(path: Path) -> dict[str, Tensor]:
    kind = file_kind(path)
    if kind == "safetensors":
        return read_safetensors(path)
    if kind == "json":
        raise CheckpointError(f"{path}: is an index, not a file of tensors; correct the index that names it")
    if kind == "zip":
        check_zip(path)
    return unwrap(read_torch(path), path)


def describe_shard(path: Path) -> str:
    """What to give in place of one file of several; "" for others."""
    match = _SHARD.search(path.name)
    if not match:
        return ""
    index = path.with_name(f"{path.name[: match.start()]}{path.suffix}.index.json")
    return f"; it is one file of several: give {index.name}, which names them all"
