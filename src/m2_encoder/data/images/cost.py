"""What decoding a picture file may cost: time and memory are bounded from its structure, before a decoder sees it.

Without these bounds a file of a few megabytes holds a core for minutes: a progressive JPEG of hundreds of scans, or
parts that readers join one by one, each time copying what came before. Ordinary files are far below.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from typing import Final

MAX_FILE_BYTES: Final = 2**29
"""Larger files are not read."""

MAX_SCANS: Final = 100
"""Of a JPEG; encoders write about ten."""

_MAX_SCANNED_PIXELS: Final = 2 * 10**9  # pixels times scans: some seconds
_MAX_PARTS: Final = 2**16  # chunks of a PNG, of a GIF before its first picture
_MAX_SEGMENTS: Final = 1024  # of a JPEG's header
_MAX_EXIF_SEGMENTS: Final = 64  # which Pillow joins one by one
_MAX_TEXT_BYTES: Final = 2**20  # of extensions in a GIF's header
_MAX_ENTRIES: Final = 4096  # of a TIFF's directory
_MAX_RUN_BYTES: Final = 2**23  # of a run-length coded BMP, which Pillow decodes in Python
_SCAN, _END = 0xDA, 0xD9
_MARKER: Final = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])", re.DOTALL)  # in coded pixels: a marker, and no restart
_TIFF_BYTES: Final = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
_TIFF_INNER: Final = (0x8769, 0x8825, 0xA005)  # tags that name a directory of EXIF, of GPS, of interoperability


def find_excess(content: bytes, kind: str) -> str | None:
    """Why a file of a format (Pillow's name) is not to be opened, in words; None if it may."""
    if len(content) > MAX_FILE_BYTES:
        return f"{len(content):,} bytes"
    check = _CHECKS.get(kind)
    return None if check is None else check(content)


def find_pixel_excess(content: bytes, kind: str, size: tuple[int, int]) -> str | None:
    """The same for what depends on width and height."""
    if kind == "JPEG" and (scans := count_scans(content)) > 1:
        if scans > MAX_SCANS:
            return f"more than {MAX_SCANS} scans"
        if scans * size[0] * size[1] > _MAX_SCANNED_PIXELS:
            return f"{scans} scans of {size[0]} x {size[1]} pixels"
    return None


def count_scans(content: bytes) -> int:
    """Scans of a JPEG, or a few more than there are; exact above `MAX_SCANS`, and one more than that at most."""
    scans = content.count(b"\xff\xda")  # which other parts of the file may hold, too
    return scans if scans <= MAX_SCANS else _follow_scans(content)


def _follow_scans(content: bytes) -> int:
    scans, at = 0, 2
    while scans <= MAX_SCANS and (match := _MARKER.search(content, at)) is not None:
        if match[1][0] == _END:
            break
        scans += match[1][0] == _SCAN
        at = match.end() + int.from_bytes(content[match.end() : match.end() + 2], "big")
    return scans


def _check_jpeg(content: bytes) -> str | None:
    at, segments, exif = 2, 0, 0
    while at + 4 <= len(content) and content[at] == 0xFF and content[at + 1] != _SCAN:
        if content[at + 1] == 0xFF:  # padding
            at += 1
            continue
        segments += 1
        exif += content.startswith(b"Exif\0\0", at + 4)
        if segments > _MAX_SEGMENTS or exif > _MAX_EXIF_SEGMENTS:
            return f"more than {_MAX_SEGMENTS:,} segments, or {_MAX_EXIF_SEGMENTS} of EXIF, in its header"
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return None


def _check_png(content: bytes) -> str | None:
    at, chunks = 8, 0
    while at + 8 <= len(content) and content[at + 4 : at + 8] != b"IEND":
        at += 12 + int.from_bytes(content[at : at + 4], "big")
        chunks += 1
        if chunks > _MAX_PARTS:
            return f"more than {_MAX_PARTS:,} chunks"
    return None


def _check_gif(content: bytes) -> str | None:
    """Extensions before the first picture; Pillow joins the parts of a comment one by one."""
    if len(content) < 13:
        return None
    at = 13 + (3 << (content[10] & 7) + 1 if content[10] & 0x80 else 0)
    begin, parts = at, 0
    while at + 2 < len(content) and content[at] not in b",;":
        if content[at] == 0x21:  # an extension: its kind, parts with their lengths, an empty one
            at += 2
            while at < len(content) and (length := content[at]) and parts <= _MAX_PARTS:
                at += 1 + length
                parts += 1
        at += 1
        parts += 1
        if parts > _MAX_PARTS or at - begin > _MAX_TEXT_BYTES:
            return f"more than {_MAX_TEXT_BYTES:,} bytes, or {_MAX_PARTS:,} parts, before its first picture"
    return None


def _check_bmp(content: bytes) -> str | None:
    is_run_length_coded = len(content) > 34 and struct.unpack_from("<I", content, 30)[0] in (1, 2)
    if is_run_length_coded and len(content) > _MAX_RUN_BYTES:
        return f"{len(content):,} bytes of run-length code"
    return None


def _check_tiff(content: bytes) -> str | None:
    """Directories whose entries name more bytes than there are: each would be read again and again."""
    order = "<" if content[:2] == b"II" else ">"
    is_big = 0x2B in content[2:4]
    count_form, entry_form, offset_at = (f"{order}Q", f"{order}HHQ", 8) if is_big else (f"{order}H", f"{order}HHI", 4)
    offset_form = f"{order}Q" if is_big else f"{order}I"
    entry_bytes, count_bytes = (20, 8) if is_big else (12, 2)
    places, seen, named = [offset_at], 0, 0
    try:
        while places:
            (start,) = struct.unpack_from(offset_form, content, places.pop())
            (count,) = struct.unpack_from(count_form, content, start)
            if (seen := seen + count) > _MAX_ENTRIES:
                return f"more than {_MAX_ENTRIES:,} entries in its directories"
            for at in range(start + count_bytes, start + count_bytes + count * entry_bytes, entry_bytes):
                tag, kind, number = struct.unpack_from(entry_form, content, at)
                if tag in _TIFF_INNER:
                    places.append(at + entry_bytes - struct.calcsize(offset_form))
                if (named := named + number * _TIFF_BYTES.get(kind, 0)) > 2 * len(content) + _MAX_TEXT_BYTES:
                    return "its directories name more bytes than it has"
    except struct.error:  # damaged: Pillow says how
        pass
    return None


_CHECKS: Final[Mapping[str, Callable[[bytes], str | None]]] = {
    "JPEG": _check_jpeg, "PNG": _check_png, "GIF": _check_gif, "BMP": _check_bmp, "TIFF": _check_tiff,
}  # fmt: skip
