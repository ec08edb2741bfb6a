"""What a checkpoint can hold: values that open without running anybody's code."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import torch

_NAMED = re.compile(r"GLOBAL ([\w.]+)")
_CALLBACKS = "callbacks"


def find_fault(file: str | Path | io.BytesIO) -> str | None:
    """What keeps a written checkpoint from being opened with `weights_only=True`; None if nothing does.

    Values of tensors are not read.
    """
    try:
        torch.load(file, map_location="meta", weights_only=True, mmap=None if isinstance(file, io.BytesIO) else True)
    except Exception as error:  # an unpickler raises what it likes
        found = _NAMED.search(str(error))
        return found[1] if found else " ".join(str(error).split())[:120] or type(error).__name__
    return None


def drop_objects(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A training state without what could not be opened again: states of callbacks, and keys that somebody added.

    With it, one object in the state of one callback would make every checkpoint of a run unreadable. Also returns a
    line about each.
    """
    lines = []
    kept, states = dict(checkpoint), dict(checkpoint.get(_CALLBACKS) or {})
    for place, what in ((states, "the state of the callback"), (kept, "the checkpoint's key")):
        for name in [name for name in place if name != _CALLBACKS]:
            if (fault := _find_fault_of(place[name])) is not None:
                del place[name]
                rule = "is not saved: a checkpoint opens without running code, and this holds"
                lines.append(f"{what} {name} {rule} {fault}; keep numbers, texts, lists and tensors in it")
    if _CALLBACKS in kept:
        kept[_CALLBACKS] = states
    return kept, lines


def _find_fault_of(value: Any) -> str | None:
    written = io.BytesIO()
    try:
        torch.save(value, written)
    except Exception as error:  # what cannot even be pickled
        return " ".join(str(error).split())[:120]
    written.seek(0)
    return find_fault(written)
