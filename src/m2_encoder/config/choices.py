"""Options of groups, and the files that define them: in `conf/` and in folders of the user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def config_folders(folder: Path, searchpath: Sequence[str] | None) -> list[Path]:
    """Where options are looked for, in this order.

    Args:
        folder: of the primary configuration.
        searchpath: Hydra's, of which packages are left out.
    """
    places = [str(place).removeprefix("file://") for place in searchpath or ()]
    return [folder, *(Path(place) for place in places if "://" not in place)]


def read_options(folders: Sequence[Path], group: str) -> dict[str, tuple[Path, Mapping[str, Any]]]:
    """Every option of a group, by name: its file and the keys at its top, none if it cannot be read.

    Args:
        folders: of `config_folders`; of two files of one name, the first counts.
        group: its name.
    """
    found: dict[str, tuple[Path, Mapping[str, Any]]] = {}
    for folder in folders:
        for path in sorted((folder / group).glob("*.yaml")):
            if path.stem not in found:
                found[path.stem] = (path, _read(path))
    return found


def find_conflict(folders: Sequence[Path], group: str, chosen: Sequence[object]) -> str | None:
    """What is wrong with choosing these options together, or None.

    Hydra merges options that define the same key: of `cmim` and `cmim_codes` only one would count, and no word of it.

    Args:
        folders: of `config_folders`.
        group: its name.
        chosen: names of its options.
    """
    if len(chosen) < 2:
        return None
    if twice := next((name for name in chosen if list(chosen).count(name) > 1), None):
        return f"{twice} is there twice; name it once"
    options = read_options(folders, group)
    owners: dict[str, object] = {}
    for name in chosen:
        _, content = options.get(str(name), (None, {}))
        for key in content:
            if key != "defaults" and (other := owners.setdefault(key, name)) != name:
                return f"{other} and {name} both define {key}, so that only one of them would count; choose one"
    return None


def describe_nameless(folders: Sequence[Path], group: str, target: object) -> str | None:
    """The message for an option whose values lie where the names of options should be, or None.

    Args:
        folders: of `config_folders`.
        group: one of which several options are chosen, each below a key of its own.
        target: the `_target_` that was found among the names.
    """
    for name, (path, content) in read_options(folders, group).items():
        if target is not None and content.get("_target_") == target:
            return f"{group}=[...,{name}]: {path} must begin with `{name}:`, with its values indented below"
    return None


def _read(path: Path) -> Mapping[str, Any]:
    """What cannot be read has no keys here; Hydra says why when the option is chosen."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError):
        return {}
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}
