"""The shards that a curation reads: named sources, each a list of local tars in a fixed order."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from m2_encoder.data.shards import paths
from m2_encoder.errors import UserError

RESERVED_NAMES: Final = ("decisions",)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Shard(NamedTuple):
    """One tar to read."""

    number: int  # place among all shards of the curation; where copies compete, the lowest number wins
    source: str  # name of the source it belongs to
    language: str | None  # of captions that declare none; None to detect it
    path: str
    size: int
    written: int  # time of the last change, ns

    @property
    def stem(self) -> str:
        """Name of its intermediate files."""
        return f"{self.source}-{self.number:06d}"


def list_shards(
    sources: Mapping[str, str | Sequence[str]], languages: Mapping[str, str | None] | None = None
) -> list[Shard]:
    """Every shard of every source, in the order of sources and of names.

    Args:
        sources: by name, a folder, a glob or brace expression (`data/{000..099}.tar`), or a list of those.
        languages: by source, the language of captions that declare none.

    Raises:
        UserError: for a name that cannot be a folder's, a source without tars, a tar in there twice, or a URL.
    """
    languages = languages or {}
    unknown = sorted(set(languages) - set(sources))
    if unknown:
        raise UserError(f"language of {unknown[0]!r}: no such source; there is {', '.join(sources)}")
    found: dict[str, str] = {}
    shards: list[Shard] = []
    for name, expression in sources.items():
        if not is_source_name(name):
            raise UserError(
                f"source {name!r}: use letters of English, digits, dots, dashes and underscores, and not `decisions`"
            )
        for path in _find(name, expression):
            if path in found:
                raise UserError(f"{path}: is in the sources {found[path]} and {name}; leave one out")
            found[path] = name
            status = os.stat(path)
            shards.append(Shard(len(shards), name, languages.get(name), path, status.st_size, status.st_mtime_ns))
    if not shards:
        raise UserError("no sources: give at least one folder or pattern of tars")
    return shards


def is_source_name(name: str) -> bool:
    """Whether a source can be called that: it becomes the name of a folder and of files."""
    return _NAME.fullmatch(name) is not None and name not in RESERVED_NAMES


def _find(name: str, expression: str | Sequence[str]) -> list[str]:
    how = "curation reads local or mounted files; download the shards first"
    try:
        found = paths.list_shards(expression, refuse_urls=how)
    except UserError as error:
        raise UserError(f"source {name}: {error}") from error
    missing = [path for path in found if not os.path.isfile(path)]
    if missing:
        raise UserError(f"source {name}: {missing[0]}: no such tar, and {len(missing) - 1:,} more are missing")
    return [os.path.abspath(path) for path in found]
