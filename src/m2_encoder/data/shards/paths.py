"""Files that a source names: by paths, folders, patterns, brace expressions or urls."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from m2_encoder.data.images.suffixes import PICTURE_SUFFIXES
from m2_encoder.data.shards.names import is_clutter
from m2_encoder.errors import UserError, name_some

_PATTERN = frozenset("*?[")


def list_shards(patterns: str | Sequence[str], *, refuse_urls: str | None = None) -> list[str]:
    """The tars of a source.

    Args:
        patterns: a path or url, or several; with braces, `*` and `?`, or a folder of `*.tar`.
        refuse_urls: what to do instead of giving a url; None takes them.

    Returns:
        Paths and urls, patterns in their order, what fits one sorted by name. Names that braces spell need not exist.

    Raises:
        UserError: for a pattern without a match, a path that is not there, a url where none is wanted, a `pipe:`
            command, or a shard that comes twice.
    """
    parts = [patterns] if isinstance(patterns, str) else list(patterns)
    if not parts:
        raise UserError("no shard given; give a file, a folder, a pattern such as data/*.tar, or a list")
    found: list[str] = []
    for part in parts:
        if part.startswith("pipe:"):
            raise UserError(
                f"{part}: what a command prints cannot be read by offset; give a url such as "
                "s3://bucket/{000..099}.tar"
            )
        if not is_remote(part):
            found += _expand(part.removeprefix("file://"), (".tar",), "shard")
        elif refuse_urls is not None:
            raise UserError(f"{part} is remote; {refuse_urls}")
        else:
            found += _expand_url(part)
    # Of a single pattern all are spelled alike; of several, one may say ./a.tar and another a.tar.
    places = found if len(parts) == 1 else [shard if is_remote(shard) else os.path.abspath(shard) for shard in found]
    if len(set(places)) < len(places):
        counts = Counter(places)
        twice = next(shard for shard, place in zip(found, places, strict=True) if counts[place] > 1)
        raise UserError(f"{twice} comes twice; leave one out")
    return found


def find_files(source: str | Sequence[str], *, suffixes: Sequence[str], what: str) -> list[Path]:
    """Local files of a source, in its order, those of a folder or pattern sorted.

    Args:
        source: a file, a folder (its files with one of the suffixes, not those in sub-folders), a pattern such as
            "data/*.tar", a brace expression such as "data/{000..099}.tar" (its files need not exist), or a list.
        suffixes: in lower case.
        what: the kind of file, for messages.

    Raises:
        UserError: if a part names no file.
    """
    parts = [source] if isinstance(source, str) else list(source)
    if not parts:
        raise UserError(f"no {what} given; give a file, a folder, a pattern such as data/*{suffixes[0]}, or a list")
    return [Path(name) for part in parts for name in _expand(str(part), suffixes, what)]


def is_remote(shard: str) -> bool:
    """Whether a shard is a url."""
    return "://" in shard and not shard.startswith(("file://", "pipe:"))


def _expand(part: str, suffixes: Sequence[str], what: str) -> list[str]:
    part = os.path.expanduser(part)
    if os.path.isdir(part):
        return _list_folder(part, suffixes)
    if os.path.exists(part):  # whatever signs are in its name
        return [part]
    is_pattern = not _PATTERN.isdisjoint(part)
    if "{" not in part and not is_pattern:
        raise UserError(f"{part}: no such file or folder; {what_is_there(part)}")
    names = _expand_braces(part)
    if not is_pattern:  # of 600,000 names of tars, none is looked up
        lists = (_list_folder(name, suffixes) if _is_folder(name, suffixes) else [name] for name in names)
        return [name for names in lists for name in names]
    matches = (match for name in names for match in sorted(glob.glob(name, recursive=True)))
    found = [each for each in matches if (_suffix(each) in suffixes or os.path.isfile(each)) and not is_clutter(each)]
    if not found:
        raise UserError(f"{part}: no file fits; give a file, a folder or a pattern with {what}s; {what_is_there(part)}")
    return found


def _list_folder(folder: str, suffixes: Sequence[str]) -> list[str]:
    with os.scandir(folder) as entries:
        inside = {entry.name: entry.is_dir() for entry in entries}
    found = sorted(
        name
        for name, is_folder in inside.items()
        if not is_folder and _suffix(name) in suffixes and not is_clutter(name)
    )
    if not found:
        wanted = " or ".join(f"*{suffix}" for suffix in suffixes)
        is_unpacked = any(_suffix(name) in PICTURE_SUFFIXES for name in inside) and ".tar" in suffixes
        fix = f"; m2-data pack {folder} output=TARS packs pictures" if is_unpacked else ""
        raise UserError(f"{folder}: no {wanted} there; it holds {name_some(sorted(inside)) or 'nothing'}{fix}")
    return [os.path.join(folder, name) for name in found]


def _expand_url(pattern: str) -> list[str]:
    found: list[str] = []
    for url in _expand_braces(pattern):
        if any(sign in url for sign in "*["):  # a ? is part of many urls
            import fsspec

            system, path = fsspec.core.url_to_fs(url)
            found += sorted(system.unstrip_protocol(match) for match in system.glob(path))
        else:
            found.append(url)
    if not found:
        raise UserError(f"{pattern}: no file fits")
    return found


def _expand_braces(pattern: str) -> list[str]:
    """Names of a brace expression such as "data/{000..099}.tar"."""
    from webdataset.shardlists import expand_urls

    try:
        return list(expand_urls(pattern))
    except (ValueError, KeyError, AssertionError) as error:
        raise UserError(
            f"{pattern}: its braces cannot be read ({error}); write ranges as {{000..099}}, alternatives as {{a,b}}"
        ) from error


def what_is_there(path: str) -> str:
    """What the nearest folder above a path, or a pattern of paths, holds."""
    folder = path
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder.rstrip("/")) if folder.strip("/") else "/"
    return f"{folder or 'the working directory'} holds {name_some(sorted(os.listdir(folder or '.'))) or 'nothing'}"


def _is_folder(name: str, suffixes: Sequence[str]) -> bool:
    return _suffix(name) not in suffixes and os.path.isdir(name)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()
