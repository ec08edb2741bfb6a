"""Index of a tar, `<tar>.index`: where each usable sample lies, and what is unusable.

It is built from the tar's headers on first use, and again when the tar's size or time of writing changes.

File: magic, length of the header, header (JSON), table of samples, keys (UTF-8), faults (JSON), CRC-32 of all before.
The header alone has the number of samples, which is all that planning a mixture reads.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from m2_encoder.data.images.suffixes import PICTURE_SUFFIXES
from m2_encoder.data.shards.grouping import group_members
from m2_encoder.data.shards.tar_scan import UNREADABLE, TarMember, padded, scan_tar
from m2_encoder.errors import UserError, name_some
from m2_encoder.files import atomic_file

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = tuple(suffix[1:] for suffix in PICTURE_SUFFIXES)
"""Extensions of members that are pictures; the first of a sample's that is there is its image."""

INDEX_SUFFIX = ".index"
"""Appended to the name of a tar."""

_MAGIC = b"M2INDEX4"  # another number when the same tar gives another index
# By number, in the table; that of an extension stays, because it is part of what tells a shard from another.
_EXTENSIONS = ("", "webp", "png", "jpg", "jpeg", "jpe", "jfif", "apng", "avif", "heic", "heif", "hif", "tif", "tiff",
               "bmp", "dib", "gif")  # fmt: skip
_SAMPLE = np.dtype(
    [
        ("image", "<u8"),
        ("image_size", "<u4"),
        ("json", "<u8"),
        ("json_size", "<u4"),  # 0: there is none
        ("text", "<u8"),
        ("text_size", "<u4"),  # 0: there is none
        ("extension", "u1"),
        ("key_end", "<u8"),
    ]
)
_HEADER_BYTES = 512  # more than a header takes
_MAX_MEMBER_BYTES = 2**32 - 1
_MAX_NAMES, _MAX_NAME = 8, 40  # of extensions in a message, and characters of one


class Member(NamedTuple):
    """One file inside a tar."""

    offset: int  # where its bytes start, from the beginning of the tar
    size: int  # how many there are


class ShardFault(NamedTuple):
    """Something unusable in a shard."""

    key: str | None  # of the sample; None if it concerns the shard
    reason: str  # one word, as in the metrics
    detail: str  # what was found


class IndexedSample(NamedTuple):
    """Where one sample lies."""

    key: str  # name of its members up to a dot of the file name (see `grouping`), folders included
    extension: str  # of the image, lower case
    image: Member  # the image file
    json: Member | None  # its `.json`; None without one
    text: Member | None  # its `.txt`; None without one


class IndexHeader(NamedTuple):
    """Header of an index file."""

    samples: int  # usable samples, by the tar's headers alone
    size: int  # of the tar, bytes
    written: int = 0  # when the tar was last written, ns; 0 if unknown
    unusable: int = 0  # entries that are unusable by the tar's headers
    layout: int = 0  # CRC-32 of the table and the keys: another order or size of samples is another shard
    keys: int = 0  # bytes of all keys
    faults: int = 0  # bytes of the list of what is unusable


class ShardIndex:
    """Samples of one shard by number, with the tar's size in bytes and time of last writing in ns."""

    def __init__(
        self, *, size: int, written: int, faults: Sequence[ShardFault], table: npt.NDArray[np.void], keys: bytes
    ) -> None:
        self.size = size
        self.written = written
        self.faults = tuple(faults)
        self._table = table
        self._keys = keys

    def __len__(self) -> int:
        """Number of usable samples, by the tar's headers."""
        return len(self._table)

    def __getitem__(self, number: int) -> IndexedSample:
        """One sample, by a number 0 or more.

        Raises:
            IndexError: beyond the last one.
        """
        if not 0 <= number < len(self._table):
            raise IndexError(f"sample {number} of a shard with {len(self._table)}")
        image, image_size, json_at, json_size, text, text_size, extension, key_end = self._table[number].item()
        start = int(self._table[number - 1]["key_end"]) if number else 0
        return IndexedSample(
            self._keys[start:key_end].decode(),
            _EXTENSIONS[extension],
            Member(image, image_size),
            Member(json_at, json_size) if json_size else None,
            Member(text, text_size) if text_size else None,
        )

    def header(self) -> IndexHeader:
        """Header of the index file."""
        layout = zlib.crc32(self._keys, zlib.crc32(self._table.tobytes()))
        keys, faults = len(self._keys), len(self._dump_faults())
        return IndexHeader(len(self), self.size, self.written, len(self.faults), layout, keys, faults)

    def dump(self) -> bytes:
        """Content of the index file."""
        encoded = json.dumps(self.header()._asdict()).encode()
        parts = [struct.pack("<I", len(encoded)), encoded, self._table.tobytes(), self._keys, self._dump_faults()]
        body = b"".join([_MAGIC, *parts])
        return body + struct.pack("<I", zlib.crc32(body))

    def _dump_faults(self) -> bytes:
        return json.dumps(self.faults, ensure_ascii=False).encode("utf-8", "replace")


def load_index(path: str | os.PathLike[str]) -> ShardIndex | None:
    """Read an index file; None if there is none, or a damaged or foreign one."""
    try:
        return parse_index(Path(path).read_bytes())
    except FileNotFoundError:
        return None


def parse_index(content: bytes) -> ShardIndex | None:
    """Parse an index file; None for a damaged or foreign one."""
    header = parse_header(content)
    if header is None or struct.unpack("<I", content[-4:])[0] != zlib.crc32(memoryview(content)[:-4]):
        return None
    start = len(_MAGIC) + 4 + struct.unpack_from("<I", content, len(_MAGIC))[0]
    table = np.frombuffer(content, _SAMPLE, header.samples, start)
    keys_end = start + table.nbytes + header.keys
    faults = json.loads(content[keys_end : keys_end + header.faults])
    return ShardIndex(
        size=header.size,
        written=header.written,
        faults=[ShardFault(*fault) for fault in faults],
        table=table,
        keys=content[start + table.nbytes : keys_end],
    )


def parse_header(content: bytes) -> IndexHeader | None:
    """Parse the header of an index file, from its first bytes; None for a foreign one."""
    start = len(_MAGIC) + 4
    if len(content) < start + 4 or content[: len(_MAGIC)] != _MAGIC:
        return None
    try:
        values = json.loads(content[start : start + struct.unpack_from("<I", content, len(_MAGIC))[0]])
        return IndexHeader(**{name: int(values[name]) for name in IndexHeader._fields})
    except (ValueError, KeyError, TypeError):  # cut or flipped
        return None


def build_index(tar: str | os.PathLike[str]) -> ShardIndex:
    """Make the index of a tar from its headers.

    Raises:
        OSError: if the tar cannot be read, or is no ordinary file; whatever its bytes are, they never raise.
    """
    return scan_samples(tar)[0]


def scan_samples(tar: str | os.PathLike[str]) -> tuple[ShardIndex, list[dict[str, TarMember]]]:
    """The index of a tar, and all members of each of its samples by extension.

    Raises:
        OSError: as `build_index`.
    """
    if not stat.S_ISREG(os.stat(tar).st_mode):
        raise OSError("not an ordinary file")  # opening a pipe would wait for a writer
    descriptor = os.open(tar, os.O_RDONLY)
    try:
        status = os.fstat(descriptor)
        scan = scan_tar(descriptor, size=status.st_size)
    finally:
        os.close(descriptor)
    found, faults = _group(scan.members)
    if scan.problem is not None:
        faults.append(ShardFault(None, "truncated_shard" if scan.members else "not_a_tar", scan.problem))
    cut = next(reversed(found), None) if scan.problem is not None else None  # its other members may be lost
    rows: list[tuple[int, ...]] = []
    keys: list[bytes] = []
    usable: list[dict[str, TarMember]] = []
    key_end = 0
    for key, members in found.items():
        row = _check_sample(key, members, faults, tar_size=status.st_size, is_cut=key == cut)
        if row is not None:
            keys.append(key.encode("utf-8", "replace"))
            key_end += len(keys[-1])
            rows.append((*row, key_end))
            usable.append(members)
    table = np.array(rows, _SAMPLE)
    index = ShardIndex(size=status.st_size, written=status.st_mtime_ns, faults=faults, table=table, keys=b"".join(keys))
    return index, usable


def count_samples(tar: str | os.PathLike[str]) -> IndexHeader:
    """The header of a tar's index, which is made if it is missing or old.

    Raises:
        OSError: if the tar cannot be read.
    """
    header = None
    with contextlib.suppress(FileNotFoundError), open(f"{os.fspath(tar)}{INDEX_SUFFIX}", "rb") as file:
        header = parse_header(file.read(_HEADER_BYTES))
    status = os.stat(tar)
    if header is not None and (header.size, header.written) == (status.st_size, status.st_mtime_ns):
        return header
    return open_index(tar).header()


def open_index(tar: str | os.PathLike[str], *, write: bool = True) -> ShardIndex:
    """The index of a tar: the file beside it if that is up to date, or a new one, written there.

    Where the folder cannot be written, the new index stays in memory, with a warning; without `write`, always.

    Raises:
        OSError: if the tar cannot be read.
    """
    path = Path(f"{os.fspath(tar)}{INDEX_SUFFIX}")
    status = os.stat(tar)
    index = load_index(path)
    if index is not None and (index.size, index.written) == (status.st_size, status.st_mtime_ns):
        return index
    index = build_index(tar)
    if write:
        try:
            with atomic_file(path) as temporary:
                temporary.write_bytes(index.dump())
        except UserError as error:
            logger.warning("%s: every process will scan the tar again", error)
    return index


def find_files(descriptor: int, index: ShardIndex, number: int, extensions: Sequence[str]) -> dict[str, Member]:
    """Further files of a sample by extension; they stand beside its image, as in any WebDataset tar.

    Args:
        descriptor: the opened tar.
        index: of that tar.
        number: of the sample.
        extensions: in lower case; those that are not there are left out.

    Raises:
        OSError: if the tar cannot be read.
    """
    own_image = index[number].image
    start = max(padded(each.offset + each.size) for each in _files(index[number - 1])) if number else 0
    end = min(each.offset for each in _files(index[number + 1])) if number + 1 < len(index) else index.size
    if not start <= own_image.offset < end:  # members that are links, or not in the order of samples
        start, end = 0, index.size
    found, _ = _group(scan_tar(descriptor, size=end, start=start).members)
    # A part of the tar may read names that are not UTF-8 otherwise than the whole does.
    same = (own for own in found.values() if any(each[1:] == own_image for each in own.values()))
    own = found.get(index[number].key) or next(same, {})
    return {
        extension: Member(*own[extension][1:])
        for extension in extensions
        if extension in own and own[extension].size != UNREADABLE
    }


def _files(sample: IndexedSample) -> list[Member]:
    return [each for each in (sample.image, sample.json, sample.text) if each is not None]


def _group(members: list[TarMember]) -> tuple[dict[str, dict[str, TarMember]], list[ShardFault]]:
    """Members by key and extension, and what is lost where several have one name."""
    found, again = group_members(members, pictures=IMAGE_EXTENSIONS)
    faults = [
        ShardFault(key, "duplicate_key", "there are several samples of this name; the first one is used")
        for key, count in again.items()
        for _ in range(count)
    ]
    return found, faults


def _check_sample(
    key: str, members: Mapping[str, TarMember], faults: list[ShardFault], *, tar_size: int, is_cut: bool
) -> tuple[int, ...] | None:
    """Row of the table without its key's end; for an unusable sample None, and its fault is added to `faults`."""
    extension = next((name for name in IMAGE_EXTENSIONS if name in members), "")
    names = [name for name in (extension, "json", "txt") if name in members]
    used = [members[name] for name in names]
    fault: tuple[str, str] | None = None
    if any(member.offset + member.size > tar_size for member in used):
        fault = ("truncated_shard", f"lies beyond the end of the tar, byte {tar_size}")
    elif is_cut and not (extension and ("json" in members or "txt" in members)):
        fault = ("truncated_shard", f"the tar ends after its {_list(members)}")
    elif not extension:
        fault = ("missing_image", f"has {_list(members)}; wanted one of {', '.join(IMAGE_EXTENSIONS)}")
    elif "json" not in members and "txt" not in members:
        fault = ("missing_caption", f"has {_list(members)}; wanted a json or txt")
    elif empty := [name for name in names if not members[name].size and (name != "txt" or "json" not in names)]:
        fault = ("empty_member", f"its {empty[0]} has no bytes")
    elif outside := [name for name in names if members[name].size == UNREADABLE]:
        reason = "missing_image" if outside[0] == extension else "missing_caption"
        fault = (reason, f"its {outside[0]} is a link to a file that is not in this tar, or stored sparse")
    elif any(member.size > _MAX_MEMBER_BYTES for member in used):
        fault = ("too_many_pixels", "a member of more than 4 GB")
    if fault is not None:
        faults.append(ShardFault(key, *fault))
        return None
    none = TarMember("", 0, 0)
    image, metadata, text = members[extension], members.get("json", none), members.get("txt", none)
    return (*image[1:], *metadata[1:], *text[1:], _EXTENSIONS.index(extension))


def _list(members: Mapping[str, TarMember]) -> str:
    names = [extension[:_MAX_NAME] or "a file with no extension" for extension in sorted(members)]
    return name_some(names, _MAX_NAMES, _MAX_NAME)
