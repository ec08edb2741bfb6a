"""Mappings by step, such as schedules, given on the command line: they take the place of the one that is there.

Hydra merges mappings. `objective.itm.schedule={0: 1}` on top of `{0: 0, 500: 1}` would keep step 500.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep

from m2_encoder.config.overrides import parse_override


def replace_by_step(lines: Sequence[str], compose: Callable[[Sequence[str]], Iterable[Mapping[str, Any]]]) -> list[str]:
    """Overrides in which such a mapping is emptied before it is given anew.

    Args:
        lines: as typed. `+key={...}` stays alone: a plus adds to what is there.
        compose: gives the configurations of other overrides: one, or those of the jobs of a sweep.
    """
    given = {line: paths for line in lines if (paths := _paths_by_step(line))}
    if not given:
        return list(lines)
    there: set[str] = set()
    wanted = {path for paths in given.values() for path in paths}
    for cfg in compose([line for line in lines if line not in given]):
        there |= {path for path in wanted if is_by_step(_find(cfg, path))}
        if there == wanted:
            break
    replaced = []
    for line in lines:
        # Of two overrides with the same key, Hydra's sweeper keeps the last: the one before gets another prefix.
        prefix = "" if line.startswith("++") else "++"
        replaced += [f"{prefix}{path}=null" for path in given.get(line, ()) if path in there]
        replaced.append(line)
    return replaced


def is_by_step(node: Any) -> bool:
    """Whether a value is a mapping by step: all its keys are whole numbers, or the text of one."""
    return isinstance(node, Mapping) and bool(node) and all(str(key).isdigit() for key in node)


def _paths_by_step(line: str) -> list[str]:
    """Keys that an override gives such a mapping, itself or inside of the mapping that is its value."""
    override = parse_override(line)
    if override is None or override.is_add() or override.is_delete():
        return []
    value = override.value()
    values = value.list if isinstance(value, ChoiceSweep) else [value]
    return list(dict.fromkeys(path for item in values for path in _walk(item, override.key_or_group)))


def _walk(value: Any, path: str) -> Iterator[str]:
    if is_by_step(value):
        yield path
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, f"{path}.{key}")


def _find(node: Any, key: str) -> Any:
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node
