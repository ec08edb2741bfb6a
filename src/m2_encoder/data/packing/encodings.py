"""In which encoding a table is, and what separates its columns."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from m2_encoder.errors import UserError

_MARKS: Final = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_CHUNK_BYTES: Final = 1 << 20
_COMMON_SHARE: Final = 0.9  # of characters that are not ASCII
_SEPARATORS: Final = "\t;,"


def find_encoding(path: Path) -> str:
    """The encoding of a table, as Python names it.

    A byte order mark says it. Without one it is UTF-8, if all bytes can be that; else GB18030, as Excel saves in China,
    if all bytes can be that and nine in ten of the characters that are not ASCII are the common ones of GB 2312 (Latin
    letters with accents in a Western encoding would give rare ones); else UTF-8 with some damaged rows.

    Raises:
        UserError: for UTF-16 without a byte order mark.
    """
    with path.open("rb") as file:
        head = file.read(256)
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    if b"\0" in head:
        raise UserError(f"{path}: looks like UTF-16 without a byte order mark; say encoding=utf-16-le (or utf-16-be)")
    try:
        for _ in _decode(path, "utf-8"):
            pass
    except UnicodeDecodeError:
        return "gb18030" if _is_chinese(path) else "utf-8-sig"
    return "utf-8-sig"


def find_separator(header: str, usual: str) -> str:
    """What separates the columns of a header line: the usual sign or, if that is not in there, another known one.

    >>> find_separator("image;caption", ","), find_separator("image,a;b", ",")
    (';', ',')
    """
    return usual if usual in header else max(_SEPARATORS, key=lambda sign: (header.count(sign), sign == usual))


def _is_chinese(path: Path) -> bool:
    others = common = 0
    try:
        for text in _decode(path, "gb18030"):
            signs = "".join(sign for sign in text if not sign.isascii())
            others += len(signs)
            common += len(signs.encode("gb2312", "ignore")) // 2
    except UnicodeDecodeError:
        return False
    return common >= _COMMON_SHARE * others


def _decode(path: Path, encoding: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)
