"""Values that the user has to give, in as few lines as there are things to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_PLACEHOLDERS: Final = {
    "model": "FOLDER",
    "name": "NAME",
    "output": "PATH",
    "shards": "PATHS",
    "targets.tokenizer": "FOLDER (a visual tokenizer's, such as outputs/visual_tokenizer/export)",
    "teacher": "FOLDER (of m2-export)",
    "tokenizer": "FILE (the SentencePiece model of the weights, such as the official sp.model)",
}


def describe_missing(keys: Sequence[str]) -> list[str]:
    """A line for each key that is `???`; one line where several parts of a mapping lack the same key.

    >>> describe_missing(["a.x.shards", "seed", "a.y.shards"])[0]
    'a.{x,y}.shards=???: must be given; add a.x.shards=PATHS and so on, or leave a part out: ~a.x'

    Args:
        keys: dotted, in the order of the configuration.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for key in keys:
        above, _, last = key.rpartition(".")
        parent, _, part = above.rpartition(".")
        groups.setdefault((parent, last) if parent else (key, ""), []).append(part if parent else key)
    lines = []
    for (parent, last), parts in groups.items():
        if len(parts) == 1:
            key = f"{parent}.{parts[0]}.{last}" if last else parent
            lines.append(f"{key}=???: must be given; add {key}={_placeholder(key)}")
        else:
            first = f"{parent}.{parts[0]}"
            lines.append(
                f"{parent}.{{{','.join(parts)}}}.{last}=???: must be given; add {first}.{last}={_placeholder(last)} "
                f"and so on, or leave a part out: ~{first}"
            )
    return lines


def _placeholder(key: str) -> str:
    parts = key.split(".")
    return _PLACEHOLDERS.get(".".join(parts[-2:])) or _PLACEHOLDERS.get(parts[-1], "VALUE")
