"""Images that must not be trained on: those of evaluation sets, as hashes.

A hash list is a text file with a line per image: 64 hex digits of SHA-256 (as `sha256sum` prints; what follows is
ignored), or three words, SHA-256, perceptual hash (16 hex digits or "-") and mean colour (6 hex digits), as
`write_hash_list` writes them. The first form finds equal files only, the second one what looks the same.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from m2_encoder.checkpoints.atomic import atomic_file
from m2_encoder.curation.images import measure_image
from m2_encoder.curation.measure import read_member
from m2_encoder.curation.tables import HASH_BYTES
from m2_encoder.data.content import SampleProblem
from m2_encoder.data.shard_index import build_index
from m2_encoder.data.shards import IMAGE_EXTENSIONS
from m2_encoder.errors import UserError

_LINE = re.compile(r"(?P<sha>[0-9a-fA-F]{64})(?:\s+(?P<hash>[0-9a-fA-F]{16}|-)\s+(?P<color>[0-9a-fA-F]{6}))?(?:\s.*)?")


class EvaluationImages(NamedTuple):
    """Hashes of all evaluation images.

    Attributes:
        hashes: SHA-256 of files, binary(32).
        perceptual: hashes of what they look like, (m,) uint64; images without one are left out.
        colors: mean colours of those, 0xRRGGBB, (m,) uint64.
    """

    hashes: pa.Array
    perceptual: npt.NDArray[np.uint64]
    colors: npt.NDArray[np.uint64]


def collect_hashes(places: Sequence[str], *, max_pixels: int) -> list[str]:
    """Lines of a hash list for everything that is named, sorted, each once.

    Args:
        places: hash lists, tars, or folders of images or tars, sub-folders included.
        max_pixels: larger images count by their bytes only.

    Raises:
        UserError: for a place that does not exist or holds no image.
    """
    lines: set[str] = set()
    for place in places:
        found = set(_lines_of(Path(place).expanduser(), max_pixels))
        if not found:
            raise UserError(f"evaluation images {place}: no image, tar or hash in there")
        lines |= found
    return sorted(lines)


def write_hash_list(path: Path, lines: Iterable[str]) -> None:
    """Write a hash list that `read_hash_list` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="ascii")


def read_hash_list(path: Path) -> EvaluationImages:
    """Read a hash list.

    Raises:
        UserError: for a line that is no hash.
    """
    matches = [_parse(path, number, line) for number, line in enumerate(_read_lines(path), start=1) if line.strip()]
    looks = [(int(m["hash"], 16), int(m["color"], 16)) for m in matches if m["hash"] not in (None, "-")]
    return EvaluationImages(
        pa.array([bytes.fromhex(match["sha"]) for match in matches], pa.binary(HASH_BYTES)),
        np.array([look for look, _ in looks], dtype=np.uint64),
        np.array([color for _, color in looks], dtype=np.uint64),
    )


def _lines_of(place: Path, max_pixels: int) -> Iterator[str]:
    if place.is_dir():
        for parent, folders, names in os.walk(place):
            folders.sort()
            for name in sorted(names):
                if name.lower().endswith((".tar", *IMAGE_EXTENSIONS)):
                    yield from _lines_of(Path(parent) / name, max_pixels)
    elif not place.is_file():
        raise UserError(f"evaluation images {place}: no such file or folder")
    elif place.suffix == ".tar":
        index = build_index(place)
        with place.open("rb") as file:
            yield from (_line(read_member(file, index[number].image), max_pixels) for number in range(len(index)))
    elif place.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS:
        yield _line(place.read_bytes(), max_pixels)
    else:
        for number, line in enumerate(_read_lines(place), start=1):
            if line.strip():
                match = _parse(place, number, line)
                yield " ".join(part.lower() for part in (match["sha"], match["hash"], match["color"]) if part)


def _line(content: bytes, max_pixels: int) -> str:
    try:
        measure = measure_image(content, max_pixels=max_pixels)
    except SampleProblem:  # its bytes can still be met again
        return hashlib.sha256(content).hexdigest()
    look = "-" if measure.perceptual_hash is None else f"{measure.perceptual_hash:016x}"
    return f"{measure.image_hash.hex()} {look} {measure.mean_color:06x}"


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"evaluation images {path}: cannot be read as a hash list ({error})") from error


def _parse(path: Path, number: int, line: str) -> re.Match[str]:
    match = _LINE.fullmatch(line.strip())
    if match is None:
        raise UserError(
            f"evaluation images {path}: line {number}, {line.strip()[:40]!r}, is no SHA-256 hash; "
            "write 64 hex digits a line, as sha256sum prints them"
        )
    return match
