"""Offsets of the files in a tar, read from its headers, also if it is cut or damaged.

`tarfile` reads 16,000 samples per second and core and takes a damaged header for the end. Here one `pread` per header
follows the chain of sizes, and checksums of many headers are computed at once.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from m2_encoder.data.shards.names import decode_names

BLOCK = 512
"""Bytes of a header; members start at multiples of it."""

_CHUNK = 16_384  # headers that are checked together, 8 MB
_FILES = frozenset(b"\x000\x0f7")  # types of ordinary files: old and new, and contiguous ones
_LONG_NAME, _PAX, _PAX_GLOBAL, _LONG_LINK = b"LxgK"
_HARD_LINK, _SYMBOLIC_LINK, _SPARSE = b"12S"
_MAX_LINKS = 8  # that lead to a file one after the other
_CHECKSUM = slice(148, 156)
_MAX_EXTENDED_BYTES = 1 << 20  # of one extended header: real ones hold a name, garbage claims gigabytes


UNREADABLE = -1
"""Size of a member whose bytes are not in the tar as they are."""


class TarMember(NamedTuple):
    """One file of a tar; a link inside of the tar is the file that it leads to."""

    name: str  # as `names.decode_names` reads it
    offset: int  # where its bytes start, from the beginning of the tar
    size: int  # how many there are; `UNREADABLE` for a link out of the tar, and a sparse file


class _Entry(NamedTuple):
    """A file or a link."""

    name: bytes
    offset: int
    size: int
    target: bytes | None = None  # name of the member that a link leads to


class TarScan(NamedTuple):
    """What a tar holds."""

    # files whose header is sound, in order; the last one's bytes may lie beyond the end
    members: list[TarMember]
    end: int  # first byte that is not part of a sound member
    problem: str | None  # what stops the scan before the empty block that ends a tar; None for a whole one


def scan_tar(descriptor: int, *, size: int, start: int = 0) -> TarScan:
    """Read all headers of an opened tar of `size` bytes, from the offset `start` on.

    Raises:
        OSError: if the disk does not give the bytes; damaged content never raises.
    """
    entries: list[_Entry] = []
    long_name: bytes | None = None
    long_link: bytes | None = None
    pax_size: int | None = None
    end, problem = start, f"no tar, {size} bytes" if size else "empty, 0 bytes"
    for offset, header, is_sound in _headers(descriptor, size, start):
        if header == bytes(BLOCK):
            return TarScan(_members(entries), offset, None)
        if not is_sound or (length := _parse_size(header)) is None:
            return TarScan(_members(entries), offset, _describe_damage(header, offset))
        length = length if pax_size is None else pax_size
        kind = header[156]
        if kind in (_LONG_NAME, _LONG_LINK, _PAX):
            content = os.pread(descriptor, min(length, _MAX_EXTENDED_BYTES), offset + BLOCK)
            if kind == _LONG_NAME:
                long_name = _text(content)
            elif kind == _LONG_LINK:
                long_link = _text(content)
            else:
                pax_name, pax_link, pax_size = _parse_pax(content)
                long_name, long_link = pax_name or long_name, pax_link or long_link
        elif kind != _PAX_GLOBAL:
            if kind in _FILES:
                entries.append(_Entry(long_name or _name(header), offset + BLOCK, length))
            elif kind in (_HARD_LINK, _SYMBOLIC_LINK):
                target = long_link or _text(header[157:257])
                name = long_name or _name(header)
                if kind == _SYMBOLIC_LINK:
                    target = posixpath.join(posixpath.dirname(name), target)
                entries.append(_Entry(name, offset + BLOCK, UNREADABLE, target))
            elif kind == _SPARSE:
                entries.append(_Entry(long_name or _name(header), offset + BLOCK, UNREADABLE))
            long_name, long_link, pax_size = None, None, None
        end = offset + BLOCK + padded(length)
        problem = f"cut at byte {size}" if end > size else f"no end marker at byte {end}"
    return TarScan(_members(entries), min(end, size), problem)


def _members(entries: list[_Entry]) -> list[TarMember]:
    if any(entry.target is not None for entry in entries):
        known = {posixpath.normpath(entry.name): entry for entry in reversed(entries)}
        entries = [entry if entry.target is None else _follow_link(entry, known) for entry in entries]
    names = decode_names([entry.name for entry in entries])
    return [TarMember(name, entry.offset, entry.size) for name, entry in zip(names, entries, strict=True)]


def _follow_link(link: _Entry, known: dict[bytes, _Entry]) -> _Entry:
    found: _Entry | None = link
    for _ in range(_MAX_LINKS):
        if found is None or found.target is None:
            break
        found = known.get(posixpath.normpath(found.target))
    if found is None or found.target is not None:
        return link
    return link._replace(offset=found.offset, size=found.size)


def _headers(descriptor: int, size: int, offset: int) -> Iterator[tuple[int, bytes, bool]]:
    """Offset, header, and whether its checksum is right, along the chain of sizes."""
    while offset < size:
        offsets: list[int] = []
        headers: list[bytes] = []
        offset = _follow(descriptor, offset, size, offsets, headers)
        yield from zip(offsets, headers, _check(headers), strict=True)


def _follow(descriptor: int, offset: int, size: int, offsets: list[int], headers: list[bytes]) -> int:
    """Append headers from an offset on; returns the offset of the next one, or `size` where the chain ends."""
    pread = os.pread
    pax_size: int | None = None
    while len(headers) < _CHUNK or pax_size is not None:
        header = pread(descriptor, BLOCK, offset)
        if len(header) < BLOCK:
            break
        offsets.append(offset)
        headers.append(header)
        try:
            length = int(header[124:135], 8)
        except ValueError:
            parsed = _parse_size(header)
            if parsed is None:
                break  # an empty or a damaged block
            length = parsed
        kind = header[156]
        if pax_size is not None:
            length, pax_size = pax_size, None
        if not 0 <= length <= size:
            break  # checksums come later: a damaged size leads before the file, or further than an offset reaches
        if kind == _PAX:
            if length > _MAX_EXTENDED_BYTES:
                break
            pax_size = _parse_pax(pread(descriptor, length, offset + BLOCK))[2]
        offset += BLOCK + padded(length)
    else:
        return offset
    return size


def _check(headers: list[bytes]) -> list[bool]:
    """Whether the checksum of each header is right."""
    if not headers:
        return []
    table: npt.NDArray[np.uint8] = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, BLOCK)
    sums = table.sum(axis=1, dtype=np.int64) - table[:, _CHECKSUM].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
    return [_octal(header[_CHECKSUM]) == total for header, total in zip(headers, sums.tolist(), strict=True)]


def _octal(field: bytes) -> int | None:
    try:
        return int(field.rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        return None


def _parse_size(header: bytes) -> int | None:
    """Size of a member: octal, or binary where octal digits do not suffice; None if the field holds neither."""
    field = header[124:136]
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0", 1)[0].strip()
    value = _octal(text)
    return None if value is None or value < 0 else value


def _parse_pax(content: bytes) -> tuple[bytes | None, bytes | None, int | None]:
    """Name, target and size of an extended header of the form `<length> <key>=<value>` and a line feed."""
    name, link, size = None, None, None
    while content:
        digits = content.split(b" ", 1)[0]
        if not _is_number(digits) or not 0 < int(digits) <= len(content):
            break
        record, content = content[len(digits) + 1 : int(digits) - 1], content[int(digits) :]
        key, _, value = record.partition(b"=")
        if key == b"path":
            name = _text(value)
        elif key == b"linkpath":
            link = _text(value)
        elif key == b"size" and _is_number(value):
            size = int(value)
    return name, link, size


def _is_number(digits: bytes) -> bool:
    return digits.isdigit() and len(digits) <= 20  # 2^64 has 20; `int` raises from 4,300 on


def _name(header: bytes) -> bytes:
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        return _text(header[345:500]) + b"/" + name
    return name


def _text(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def padded(length: int) -> int:
    """Length rounded up to whole blocks."""
    return (length + BLOCK - 1) // BLOCK * BLOCK


def _describe_damage(header: bytes, offset: int) -> str:
    if offset:
        return f"damaged at byte {offset}"
    packed = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}.get(header[:2])
    return f"packed with {packed}; unpack it, samples are read by offset" if packed else "not a tar"
