"""Several options of one group, of which each must add something of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml


def find_conflict(folder: Path, chosen: Sequence[object]) -> str | None:
    """What is wrong with choosing these options together, or None.

    Hydra merges options that define the same key: of `cmim` and `cmim_codes` only one would count, and no word of it.

    Args:
        folder: of the group.
        chosen: names of its options.
    """
    if len(chosen) < 2:
        return None
    if twice := next((name for name in chosen if list(chosen).count(name) > 1), None):
        return f"{twice} is there twice; name it once"
    owners: dict[str, object] = {}
    for name in chosen:
        path = folder / f"{name}.yaml"
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
        for key in content or {}:
            if key != "defaults" and (other := owners.setdefault(str(key), name)) != name:
                return f"{other} and {name} both define {key}, so that only one of them would count; choose one"
    return None
