"""Random access to the samples of WebDataset tars.

A header-only scan finds where each member lies; a sample is then read by offset. So any order of samples is possible,
and the order can be a pure function of a position (see `m2_encoder.data.order.plan`).
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from m2_encoder.errors import UserError

IMAGE_EXTENSIONS = ("webp", "png", "jpg", "jpeg")
"""Extensions of the member that holds the image."""


class Member(NamedTuple):
    """One file inside a tar.

    Attributes:
        offset: where its bytes start, from the beginning of the tar.
        size: how many there are.
    """

    offset: int
    size: int


class SampleLocation(NamedTuple):
    """Where a sample lies.

    Attributes:
        shard: path of the tar.
        written: when the tar was last written, ns; tells that it was replaced since.
        key: name of its members up to the first dot of the file name, folders included.
        members: by extension, lower case.
    """

    shard: str
    written: int
    key: str
    members: Mapping[str, Member]


class RawSample(NamedTuple):
    """An undecoded sample.

    Attributes:
        key: as in the tar.
        image: the encoded image file.
        metadata: its JSON: `captions` {language: [text, ...]} and whatever the source adds.
        origin: "shard:key", for error messages.
    """

    key: str
    image: bytes
    metadata: dict[str, Any]
    origin: str


def index_shards(folder: str | os.PathLike[str]) -> list[SampleLocation]:
    """Locate every sample of the tars of a folder, in the order of shard names and of members.

    Raises:
        UserError: for a folder without tars or samples, a damaged or truncated tar, or a sample that lacks an image or
            its JSON.
    """
    folder = Path(folder)
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise UserError(f"{folder}: no *.tar shards there")
    locations = [location for shard in shards for location in _index_shard(shard)]
    if not locations:
        raise UserError(f"{folder}: no samples in its {len(shards)} tar(s)")
    return locations


def _index_shard(shard: Path) -> list[SampleLocation]:
    found: dict[str, dict[str, Member]] = {}
    try:
        written = shard.stat().st_mtime_ns
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                if info.isfile():
                    _add_member(found, info, shard)
            end = tar.offset
        _check_end(shard, end)
    except UserError:
        raise
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{shard}: not a readable tar ({error}); write the shard again") from error
    for key, members in found.items():
        if "json" not in members or not set(IMAGE_EXTENSIONS) & set(members):
            names = ", ".join(extension or "a file with no extension" for extension in sorted(members))
            raise UserError(
                f"{shard}: sample {key!r} has {names}; it needs a .json and one of "
                f"{', '.join('.' + extension for extension in IMAGE_EXTENSIONS)}"
            )
    return [SampleLocation(str(shard), written, key, members) for key, members in found.items()]


def _add_member(found: dict[str, dict[str, Member]], info: tarfile.TarInfo, shard: Path) -> None:
    parent, slash, name = info.name.rpartition("/")
    stem, _, extension = name.partition(".")
    members = found.setdefault(f"{parent}{slash}{stem}", {})
    if extension.lower() in members:
        raise UserError(f"{shard}: {info.name} is in there twice; write the shard again")
    members[extension.lower()] = Member(info.offset_data, info.size)


def _check_end(shard: Path, end: int) -> None:
    """Refuse a tar without the empty block that ends it: to `tarfile` a damaged header is just the end."""
    with shard.open("rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        what = "damaged" if len(block) == tarfile.BLOCKSIZE else "truncated"
        raise UserError(f"{shard}: {what} at byte {end}; write the shard again")


def read_sample(location: SampleLocation) -> RawSample:
    """Read one sample by offset.

    Raises:
        UserError: if the shard is gone, was replaced since it was indexed, or the JSON does not parse.
    """
    origin = f"{location.shard}:{location.key}"
    image_extension = next(extension for extension in IMAGE_EXTENSIONS if extension in location.members)
    try:
        with open(location.shard, "rb") as shard:
            if os.fstat(shard.fileno()).st_mtime_ns != location.written:
                raise OSError("it was written anew while this run read it")
            image = _read_member(shard.fileno(), location.members[image_extension])
            metadata = json.loads(_read_member(shard.fileno(), location.members["json"]))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{origin}: unreadable sample ({_one_line(error)}); write the shard again, then start again"
        ) from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("captions"), dict):
        raise UserError(f"{origin}: its JSON has no `captions` by language")
    return RawSample(location.key, image, metadata, origin)


def _read_member(descriptor: int, member: Member) -> bytes:
    content = os.pread(descriptor, member.size, member.offset)
    if len(content) != member.size:
        raise OSError(f"{len(content)} of {member.size} bytes")
    return content


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
