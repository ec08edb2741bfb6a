"""Groups of the configuration: their options, the files that define them, and what a choice of several leaves out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from m2_encoder.config.overrides import line_problem
from m2_encoder.config.paths import find_conf
from m2_encoder.errors import Problem

CHOSEN_AS_LISTS: Final = ("objective", "evaluation", "logger", "callbacks", "to")
"""Groups of which several options are chosen, each below a key of its own."""

OptionFiles = Mapping[str, tuple[Path, Mapping[str, Any]]]
"""By option, its file and the keys at its top."""


def read_options(group: str, folder: Path, searchpath: Sequence[str] | None) -> OptionFiles:
    """Every option of a group; of two files of one name, the first counts, and one that cannot be read has no keys."""
    places = [str(place).removeprefix("file://") for place in searchpath or ()]
    folders = [folder, *(Path(place) for place in places if "://" not in place)]
    if group in ConfigStore.instance().repo:
        folders.append(find_conf())  # see `lend_groups`
    found: dict[str, tuple[Path, Mapping[str, Any]]] = {}
    for path in (path for each in folders for path in sorted((each / group).glob("*.yaml"))):
        if path.stem not in found:
            try:
                content = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (OSError, UnicodeError, yaml.YAMLError):
                content = {}  # Hydra says why when the option is chosen
            found[path.stem] = (path, content if isinstance(content, dict) else {})
    return found


def find_conflict(line: str | None, chosen: Sequence[str], files: OptionFiles) -> Problem | None:
    """What is wrong with choosing these options together, or None.

    Hydra merges options that define the same key: of `cmim` and `cmim_codes` only one would count, and no word of it.
    """
    owners: dict[str, str] = {}
    for index, name in enumerate(chosen):
        if name in chosen[:index]:
            return line_problem(line, f"{name} is there twice", "name it once")
        for key in files[name][1] if name in files else ():
            if key != "defaults" and (other := owners.setdefault(key, name)) != name:
                rule = f"{other} and {name} both define {key}, so that only one of them would count"
                return line_problem(line, rule, "choose one")
    return None


def drop_unchosen(cfg: MutableMapping[Any, Any], folder: Path, searchpath: Sequence[str] | None) -> list[str]:
    """Drops settings of objectives that `objective=[...]` does not select, in place.

    An experiment may choose `objective=[itc,cmlm]` and set `objective.cmlm.weight`; with `objective=[itc]` on the
    command line that is left without a `_target_`. Names that no option has stay: validation refuses them.

    `cfg` is plain or not in struct mode. Returns the dotted keys of what was dropped.
    """
    dropped = []
    for group in CHOSEN_AS_LISTS:
        node = cfg.get(group)
        nodes = node.items() if isinstance(node, MutableMapping) else ()
        left = [key for key, value in nodes if isinstance(value, MutableMapping) and "_target_" not in value]
        files = read_options(group, folder, searchpath).values() if left else ()
        known = {key for _, content in files for key in content}
        for key in left:
            if key in known:
                del cfg[group][key]
                dropped.append(f"{group}.{key}")
    return dropped


@contextlib.contextmanager
def lend_groups(names: Sequence[str]) -> Iterator[None]:
    """Offers groups of `conf/` to a command whose configuration lies in a folder of its own, while the block runs."""
    store = ConfigStore.instance()
    for name in names:
        for path in sorted((find_conf() / name).glob("*.yaml")):
            store.store(group=name, name=path.stem, node=OmegaConf.load(path))
    try:
        yield
    finally:
        for name in names:
            store.repo.pop(name, None)
