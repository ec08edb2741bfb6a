"""Values for objectives that are not in the list of those chosen.

An experiment such as `emoji_full` chooses `objective=[itc,cmlm,cmim]` and sets `objective.cmlm.weight`. Who changes the
choice on the command line, as in `+experiment=emoji_full 'objective=[itc]'`, wants no word of what is left out.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any, Final

from m2_encoder.config.choices import read_options

CHOSEN_AS_LIST: Final = "objective"


def drop_unchosen(cfg: MutableMapping[Any, Any], folders: Sequence[Path]) -> list[str]:
    """Removes such values in place.

    What is left of an option that was not chosen has no `_target_`, and its key is that of an option's file. Keys that
    no file has stay: they are mistakes, which validation names.

    Args:
        cfg: composed, plain or not in struct mode.
        folders: of the configurations (`choices.config_folders`).

    Returns:
        The dotted keys of what was removed.
    """
    node = cfg.get(CHOSEN_AS_LIST)
    if not isinstance(node, MutableMapping):
        return []
    left = [key for key, value in node.items() if isinstance(value, MutableMapping) and "_target_" not in value]
    files = read_options(folders, CHOSEN_AS_LIST).values() if left else ()
    known = {key for _, content in files for key in content}
    dropped = [key for key in left if key in known]
    for key in dropped:
        del node[key]
    return [f"{CHOSEN_AS_LIST}.{key}" for key in dropped]
