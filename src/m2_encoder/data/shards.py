"""Random access to the samples of WebDataset tars.

A header-only scan finds where each member lies; a sample is then read by offset. So any order of samples is possible,
and the order can be a pure function of a position (see `m2_encoder.data.order`).
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
        key: name of its members up to the first dot.
        members: by extension, lower case.
    """

    shard: str
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
        UserError: for a folder without tars, a damaged tar, or a sample that lacks an image or its JSON.
    """
    folder = Path(folder)
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise UserError(f"{folder}: no *.tar shards there")
    return [location for shard in shards for location in _index_shard(shard)]


def _index_shard(shard: Path) -> list[SampleLocation]:
    found: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                if info.isfile():
                    key, _, extension = info.name.partition(".")
                    found.setdefault(key, {})[extension.lower()] = Member(info.offset_data, info.size)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{shard}: not a readable tar ({error}); write the shard again") from error
    locations = [SampleLocation(str(shard), key, members) for key, members in found.items()]
    size = shard.stat().st_size
    for location in locations:
        extensions = set(location.members)
        if "json" not in extensions or not extensions & set(IMAGE_EXTENSIONS):
            raise UserError(
                f"{shard}: sample {location.key!r} has {', '.join(sorted(extensions))}; it needs a .json and one of "
                f"{', '.join('.' + extension for extension in IMAGE_EXTENSIONS)}"
            )
        if any(member.offset + member.size > size for member in location.members.values()):
            raise UserError(f"{shard}: truncated inside sample {location.key!r}; write the shard again")
    return locations


def read_sample(location: SampleLocation) -> RawSample:
    """Read one sample by offset.

    Raises:
        UserError: if the shard is gone or shorter than its index says, or the JSON does not parse.
    """
    origin = f"{location.shard}:{location.key}"
    image_extension = next(extension for extension in IMAGE_EXTENSIONS if extension in location.members)
    try:
        with open(location.shard, "rb") as shard:
            image = _read_member(shard.fileno(), location.members[image_extension])
            metadata = json.loads(_read_member(shard.fileno(), location.members["json"]))
    except (OSError, ValueError) as error:
        raise UserError(f"{origin}: unreadable sample ({error}); the shard changed or is damaged") from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("captions"), dict):
        raise UserError(f"{origin}: its JSON has no `captions` by language")
    return RawSample(location.key, image, metadata, origin)


def _read_member(descriptor: int, member: Member) -> bytes:
    content = os.pread(descriptor, member.size, member.offset)
    if len(content) != member.size:
        raise OSError(f"{len(content)} of {member.size} bytes")
    return content
