"""Mappings by step, such as schedules, given on the command line: they take the place of the one that is there.

Hydra merges mappings. `objective.itm.schedule={0: 1}` on top of `{0: 0, 500: 1}` would keep step 500.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

_BY_STEP: Final = re.compile(r"(\+{0,2})([\w.]+)=\{\s*\d+\s*:")


def replace_by_step(lines: Sequence[str], compose: Callable[[Sequence[str]], Mapping[str, Any]]) -> list[str]:
    """Overrides in which such a mapping is taken away before it is given anew.

    Args:
        lines: as typed.
        compose: gives the configuration of other overrides.
    """
    given = {line: match[2] for line in lines if (match := _BY_STEP.match(line)) and match[1] != "+"}
    if not given:
        return list(lines)
    cfg = compose([line for line in lines if line not in given])
    replaced = []
    for line in lines:
        if line in given and _is_by_step(_find(cfg, given[line])):
            replaced += [f"~{given[line]}", f"+{line.lstrip('+')}"]
        else:
            replaced.append(line)
    return replaced


def _find(node: Any, key: str) -> Any:
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _is_by_step(node: Any) -> bool:
    return isinstance(node, Mapping) and bool(node) and all(str(key).isdigit() for key in node)
