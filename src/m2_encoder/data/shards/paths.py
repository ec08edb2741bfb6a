"""Which files a source names: a file, a folder, a pattern, a brace expression, or a list of them."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from m2_encoder.errors import UserError

_PATTERN = frozenset("*?[")


def find_files(source: str | Sequence[str], *, suffixes: Sequence[str], what: str) -> list[Path]:
    """Resolve a source of local files.

    Args:
        source: a file, a folder (its files with one of the suffixes, not those in sub-folders), a pattern such as
            "data/*.tar", a brace expression such as "data/{000..099}.tar", or a list of these.
        suffixes: of the files in a folder, in lower case.
        what: the kind of file, for messages.

    Returns:
        The files in the order of the source, those of a folder or pattern sorted; a file that is named by its full
        name or by braces need not exist.

    Raises:
        UserError: if a part names no file.
    """
    parts = [source] if isinstance(source, str) else list(source)
    if not parts:
        raise UserError(f"no {what} given; give a file, a folder, a pattern such as data/*{suffixes[0]}, or a list")
    return [path for part in parts for path in _expand(os.path.expanduser(str(part)), suffixes, what)]


def expand_braces(pattern: str) -> list[str]:
    """The names that a brace expression such as "data/{000..099}.tar" stands for; a name without braces is itself.

    Raises:
        UserError: if a brace is not closed, or a variable `${NAME}` has no value.
    """
    from webdataset.shardlists import expand_urls

    try:
        return list(expand_urls(pattern))
    except (ValueError, KeyError, AssertionError) as error:
        raise UserError(
            f"{pattern}: its braces cannot be read ({error}); write ranges as {{000..099}}, alternatives as {{a,b}}"
        ) from error


def _expand(part: str, suffixes: Sequence[str], what: str) -> list[Path]:
    path = Path(part)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(item for item in path.iterdir() if item.suffix.lower() in suffixes and item.is_file())
        if not found:
            inside = ", ".join(sorted(item.name for item in path.iterdir())[:5]) or "nothing"
            raise UserError(f"{part}: no {' or '.join('*' + suffix for suffix in suffixes)} there; it holds {inside}")
        return found
    if "{" in part:
        names = expand_braces(part)
    elif _PATTERN & set(part):
        names = [part]
    else:
        raise UserError(f"{part}: no such file or folder")
    found = [item for name in names for item in (_glob(name) if _PATTERN & set(name) else [Path(name)])]
    if not found:
        raise UserError(f"{part}: no file fits; give a file, a folder or a pattern with {what}s")
    return found


def _glob(pattern: str) -> list[Path]:
    return sorted(Path(name) for name in glob.glob(pattern) if os.path.isfile(name))
