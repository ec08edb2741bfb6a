"""Where the parameters stand in what training frameworks save, and what stands before their names: tables, both.

What is left of a name must then be one of `adapters.NAME_TABLE` exactly.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from torch import Tensor

from m2_encoder.checkpoints.adapters import IGNORED_NAMES, official_to_ours, ours_to_official
from m2_encoder.errors import CheckpointError

WRAPPERS: Final = ("state_dict", "model_state_dict", "module", "model")
"""Keys under which a checkpoint may hold its state dict, one in another, too; the first one present counts."""

AVERAGED_WRAPPERS: Final = (
    "ema_state_dict", "state_dict_ema", "model_ema", "model_ema_state_dict", "ema_model", "ema", "averaged_model",
)  # fmt: skip
"""Keys of a moving average of the weights (EMA), which counts only where nothing else is."""

LEADING_NAMES: Final[Mapping[str, str]] = {
    "module": "DDP, DeepSpeed and torch's AveragedModel",
    "model": "Lightning modules, ours among them",
    "net": "Lightning modules",
    "_orig_mod": "torch.compile",
    "_forward_module": "DeepSpeed",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
"""What stands before a parameter's name, several in any order -> who writes it."""

INNER_NAMES: Final = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What stands inside of a name, too, where layers were wrapped one by one."""

AVERAGED_NAMES: Final = ("ema", "model_ema", "ema_model", "averaged_model")
"""What stands before the names of a moving average that is kept beside the plain weights."""

_ADDED: Final = re.compile(
    r"text_embed\.han_pieces|backbone\.layers\.\d+\.(prompts\.(vision|text)|adapters\.\w+\.(down|up)\.(weight|bias))"
)
"""Names of added parts (`models.added_parts`), for which there are no official ones."""

_COUNTER: Final = "n_averaged"
"""How many updates an average of torch has seen; no parameter."""

_MAX_LISTED: Final = 4
_MAX_NESTED: Final = 4

_LOGGER = logging.getLogger(__name__)


class Name(NamedTuple):
    """A parameter's name in a file."""

    name: str  # ours if the parameter is known, else what the file says without known prefixes
    is_known: bool
    is_averaged: bool  # whether it is of a moving average


def our_name(name: str) -> str | None:
    """Our name of a parameter in the official spelling or in ours; None for anything else."""
    return official_to_ours(name) or (name if ours_to_official(name) or _ADDED.fullmatch(name) else None)


def unwrap(content: object, path: Path, *, says: bool = True) -> dict[str, Tensor]:
    """The state dict inside of a checkpoint's content.

    Args:
        content: of the file.
        path: for messages.
        says: whether to say which of plain and averaged weights are used.

    Raises:
        CheckpointError: if there is none.
    """
    where, averaged = "it", False
    for _ in range(_MAX_NESTED):
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a state dict")
        found = [key for key in (*WRAPPERS, *AVERAGED_WRAPPERS) if isinstance(content.get(key), Mapping)]
        if not found:
            break
        averaged = averaged or found[0] in AVERAGED_WRAPPERS
        beside = next((key for key in found if key in AVERAGED_WRAPPERS), None)
        if beside is not None and not averaged and says:
            _say_plain(path, f"its {beside!r}")
        content, where = content[found[0]], f"its {found[0]!r}"
    assert isinstance(content, Mapping)
    if averaged and says:
        _say_averaged(path, where)
    if not content:
        raise CheckpointError(f"{path}: holds no parameters ({where} is empty)")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.is_nested:
            raise CheckpointError(
                f"{path}: not a state dict: {where} has {type(value).__name__} under {str(name)[:80]!r}, "
                "expected names and tensors only"
            )
    return dict(content)


def to_our_names(state: Mapping[str, Tensor], path: Path, *, says: bool = True) -> dict[str, Tensor]:
    """Rename, and drop documented extras; of plain and averaged weights the plain ones stay.

    Raises:
        CheckpointError: if nothing is known, or two entries mean the same parameter.
    """
    names = {name: _read_name(name) for name in state if not _is_extra(name)}
    averaged = [name for name, read in names.items() if read.is_averaged and read.is_known]
    if any(read.is_known and not read.is_averaged for read in names.values()):
        if averaged and says:
            _say_plain(path, f"{averaged[0]} and others")
        if averaged:
            names = {name: read for name, read in names.items() if not read.is_averaged}
    elif averaged:
        if says:
            _say_averaged(path, f"{averaged[0]} and others")
        names = {name: read for name, read in names.items() if read.is_averaged}
    else:
        raise CheckpointError(
            f"{path}: not an M2-Encoder checkpoint: none of its {len(state)} names is known ({listed(state)})"
            f"{_describe_prefix(state)}"
        )
    renamed: dict[str, Tensor] = {}
    for name, read in names.items():
        if read.name in renamed:
            raise CheckpointError(f"{path}: two of its entries mean {read.name!r} (one is {name!r}); keep one of them")
        renamed[read.name] = state[name]
    return renamed


def _is_extra(name: str) -> bool:
    return any(extra in name for extra in IGNORED_NAMES) or name.rpartition(".")[2] == _COUNTER


def _read_name(name: str) -> Name:
    parts, averaged = name.split("."), False
    while len(parts) > 1 and parts[0] in (*LEADING_NAMES, *AVERAGED_NAMES):
        averaged |= parts.pop(0) in AVERAGED_NAMES
    bare = ".".join(parts)
    known = our_name(bare) or our_name(".".join(part for part in parts if part not in INNER_NAMES))
    return Name(known or bare, known is not None, averaged)


def _describe_prefix(state: Mapping[str, Tensor]) -> str:
    """What keeps a name from being known, where it ends in one that is."""
    for name in state:
        parts = name.split(".")
        for start in range(1, len(parts)):
            if our_name(".".join(parts[start:])) is not None:
                prefix = ".".join(parts[:start])[:80]
                return f"; their prefix {prefix + '.'!r} is none that is taken away: save the names without it"
    return ""


def _say_plain(path: Path, averaged: str) -> None:
    _LOGGER.warning(
        "%s holds averaged weights (EMA) beside the plain ones: the plain ones are used; to use %s, save them alone",
        path,
        averaged,
    )


def _say_averaged(path: Path, averaged: str) -> None:
    _LOGGER.warning("%s holds averaged weights (EMA) alone: %s are used", path, averaged)


def listed(names: Mapping[str, object] | list[str], *, separator: str = ", ") -> str:
    """The first few of many names."""
    names = list(names)
    shown = separator.join(name[:80] for name in names[:_MAX_LISTED])
    return shown if len(names) <= _MAX_LISTED else f"{shown}{separator}and {len(names) - _MAX_LISTED} more"
