"""Values for objectives that are not in the list of those chosen.

An experiment such as `emoji_full` chooses `objective=[itc,cmlm,cmim]` and sets `objective.cmlm.weight`. Who changes the
choice on the command line, as in `+experiment=emoji_full 'objective=[itc]'`, wants no word of what is left out.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, Final

import yaml

_GROUP: Final = "objective"


def drop_unchosen(cfg: MutableMapping[Any, Any], folder: Path) -> None:
    """Removes such values in place.

    What is left of an option that was not chosen has no `_target_`, and its key is that of an option's file. Keys that
    no file has stay: they are mistakes, which validation names.

    Args:
        cfg: composed, plain or not in struct mode.
        folder: of the configurations.
    """
    node = cfg.get(_GROUP)
    if not isinstance(node, MutableMapping):
        return
    left = [key for key, value in node.items() if isinstance(value, MutableMapping) and "_target_" not in value]
    known = _keys_of_options(folder / _GROUP) if left else set()
    for key in left:
        if key in known:
            del node[key]


def _keys_of_options(folder: Path) -> set[str]:
    return {
        str(key) for path in folder.glob("*.yaml") for key in yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    }
