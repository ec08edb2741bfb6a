"""Names of files that others wrote: which are no data, and how bytes that are not UTF-8 are read."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
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
