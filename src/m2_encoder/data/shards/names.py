"""Names of files that others wrote: which are no data, and how bytes that are not UTF-8 are read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Final

_CLUTTER: Final = frozenset({".ds_store", "thumbs.db", "desktop.ini"})
_CLUTTER_FOLDER: Final = "__macosx"


def is_clutter(name: str) -> bool:
    """Whether a file is one that macOS or Windows leaves in folders and archives: no sample, whatever it ends in.

    >>> [is_clutter(name) for name in ("a/._1.jpg", "__MACOSX/1.jpg", "a/Thumbs.db", "a/1.jpg")]
    [True, True, True, False]
    """
    file = name.rpartition("/")[2]
    if file.startswith("._") or file.lower() in _CLUTTER:
        return True
    return _CLUTTER_FOLDER in name.lower() and _CLUTTER_FOLDER in name.lower().split("/")[:-1]


def walk_files(
    folder: str | os.PathLike[str], *, onerror: Callable[[OSError], object] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """A folder and all below it, each with the names of its files, sorted: the files of people, not of systems.

    Hidden files and folders and clutter (`is_clutter`) are left out; links to folders are not followed. `onerror` gets
    the errors of folders that cannot be read.
    """
    for parent, folders, files in os.walk(folder, onerror=onerror):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not is_clutter(f"{name}/"))
        yield parent, sorted(name for name in files if not name.startswith(".") and not is_clutter(name))


def match_cases(texts: Collection[str], pictures: Collection[str]) -> dict[str, str]:
    """Which picture without a text a text without a picture belongs to: names that differ in case alone.

    Where several could be meant, none is.

    >>> match_cases({"dsc_1", "b", "B"}, {"DSC_1", "b"})
    {'dsc_1': 'DSC_1'}
    """
    found: dict[str, tuple[list[str], list[str]]] = {}
    for side, names in enumerate((texts, pictures) if texts else ()):
        for name in names:
            found.setdefault(name.casefold(), ([], []))[side].append(name)
    return {own[0]: other[0] for own, other in found.values() if len(own) == len(other) == 1}


def decode_names(names: Sequence[bytes]) -> list[str]:
    r"""Names of one archive or folder as text that can be printed and stored; distinct names stay distinct.

    They are UTF-8 if all of them can be; else GB18030 (of which GBK is a part) if all of them can be that, and most of
    those that are not ASCII only that; otherwise bytes that are not UTF-8 are written as in "\xd5".
    """
    readable = [_is_utf8(name) for name in names if not name.isascii()]
    if not all(readable) and 2 * sum(readable) < len(readable):
        with contextlib.suppress(UnicodeDecodeError):
            decoded = [name.decode("gb18030") for name in names]
            if len(set(decoded)) == len(set(names)):
                return decoded
    return [name.decode("utf-8", "backslashreplace") for name in names]


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True
