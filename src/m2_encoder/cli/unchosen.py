"""Values for objectives that are not in the list of those chosen.

An experiment such as `emoji_full` chooses `objective=[itc,cmlm,cmim]` and sets `objective.cmlm.weight`. Who changes the
choice on the command line, as in `+experiment=emoji_full 'objective=[itc]'`, wants no word of what is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import yaml
from omegaconf import DictConfig

_GROUP: Final = "objective"


def drop_unchosen(cfg: DictConfig, folder: Path) -> None:
    """Removes such values in place.

    What is left of an option that was not chosen has no `_target_`, and its key is that of an option's file. Keys that
    no file has stay: they are mistakes, which validation names.

    Args:
        cfg: composed, not in struct mode.
        folder: of the configurations.
    """
    node = cfg.get(_GROUP)
    if not isinstance(node, DictConfig):
        return
    left = [key for key, value in node.items() if isinstance(value, DictConfig) and "_target_" not in value]
    known = _keys_of_options(folder / _GROUP) if left else set()
    for key in left:
        if key in known:
            del node[key]


def _keys_of_options(folder: Path) -> set[str]:
    return {
        str(key) for path in folder.glob("*.yaml") for key in yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    }
