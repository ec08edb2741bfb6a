"""The head of image-text matching: taken from a training checkpoint, kept beside an exported encoder.

Letters: D width of the hidden states.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from torch import Tensor, nn

from m2_encoder.checkpoints.exported import CONFIG_FILE
from m2_encoder.checkpoints.formats import read_safetensors, read_small_json, read_torch
from m2_encoder.checkpoints.tensors import write_tensors
from m2_encoder.errors import CheckpointError, UserError
from m2_encoder.files import file_sha256

HEAD_FILE: Final = "matching.safetensors"
CONFIG_KEY: Final = "matching"
"""Entry of an exported `config.json`; folders without a head have none."""

_NAMES: Final = {"weight", "bias"}


class MatchingHead(NamedTuple):
    """What turns the hidden states of a pair into a matching score."""

    linear: nn.Linear  # D to 1, of the state of the text's first token
    text_expert: bool = False  # whether texts pass the text experts where image and text meet, as in training


def save_head(folder: Path, head: MatchingHead) -> dict[str, Any]:
    """Write the weights, in fp32, into a folder that is being exported.

    Args:
        folder: exists.
        head: with data, on any device.

    Returns:
        What `config.json` has to say of it under `CONFIG_KEY`.
    """
    state = {name: value.detach().float().cpu().contiguous() for name, value in head.linear.state_dict().items()}
    write_tensors(state, folder / HEAD_FILE, metadata={"format": "pt"})
    return {"file": HEAD_FILE, "text_expert": head.text_expert, "sha256": file_sha256(folder / HEAD_FILE)}


def has_head(folder: str | os.PathLike[str]) -> bool:
    """Whether an exported folder says that it holds a head; nothing else is looked at.

    Raises:
        CheckpointError: if its configuration cannot be read.
    """
    return CONFIG_KEY in read_small_json(Path(folder) / CONFIG_FILE)


def read_head(path: str | os.PathLike[str], *, name: str = "itm", text_expert: bool = False) -> MatchingHead:
    """The trained head of an exported folder, or of a training checkpoint.

    Args:
        path: a folder of `m2-export`, which says everything, or a checkpoint of `m2-train`.
        name: of the objective in the run; for a checkpoint.
        text_expert: `objective.itm.text_expert` of the run; for a checkpoint, which does not hold it.

    Returns:
        The head on the CPU, frozen.

    Raises:
        CheckpointError: if there is no head, or the files are damaged or do not belong together.
    """
    path = Path(path)
    if path.is_dir():
        return _read_exported(path)
    content = read_torch(path)
    state = content.get("state_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path}: no training checkpoint; give one of m2-train, or a folder of m2-export")
    try:
        return head_of_state(state, name=name, text_expert=text_expert)
    except UserError as error:
        raise CheckpointError(f"{path}: {error}") from error


def head_of_state(state: Mapping[str, Tensor], *, name: str = "itm", text_expert: bool = False) -> MatchingHead:
    """The trained head in the parameters of a training module.

    Args:
        state: `PretrainModule.state_dict()`, or `state_dict` of a training checkpoint.
        name: of the objective in that run.
        text_expert: as it was trained.

    Raises:
        UserError: if the run had no such objective.
    """
    prefix = f"objectives.{name}.head."
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if set(found) != _NAMES:
        raise UserError(
            f"the checkpoint holds no {prefix}weight and {prefix}bias; name the matching objective of its run"
        )
    return MatchingHead(_build(found), text_expert)


def _read_exported(folder: Path) -> MatchingHead:
    facts = read_small_json(folder / CONFIG_FILE).get(CONFIG_KEY)
    if facts is None:
        raise CheckpointError(
            f"{folder}: holds no matching head; train with the objective itm (m2-train +experiment=r2d2 does) "
            "and export that run with m2-export"
        )
    try:
        text_expert, digest = facts["text_expert"], facts["sha256"]
        if not isinstance(text_expert, bool):
            raise TypeError(f"text_expert={text_expert!r}")
        if file_sha256(folder / HEAD_FILE) != digest:
            raise CheckpointError(f"{folder}: {HEAD_FILE} is not the file that was exported; export the model again")
        return MatchingHead(_build(read_safetensors(folder / HEAD_FILE)), text_expert)
    except (OSError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{folder}: the matching head is damaged or edited ({reason}); export the model again"
        ) from error


def _build(state: Mapping[str, Tensor]) -> nn.Linear:
    head = nn.Linear(state["weight"].shape[1], 1, dtype=state["weight"].dtype)
    head.load_state_dict(dict(state))
    return head.requires_grad_(False)
