"""Hashes of the images of evaluation sets, which must not be trained on.

A hash list is a text file with a line per image: 64 hex digits of SHA-256 (as `sha256sum` prints; what follows is
ignored), or three words, SHA-256, perceptual hash (16 hex digits or "-") and mean colour (6 hex digits), as
`write_hash_list` writes them. The first form finds equal files only, the second one what looks the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from m2_encoder.curation.images import measure_image
from m2_encoder.curation.measure import read_member
from m2_encoder.curation.tables import HASH_BYTES
from m2_encoder.data.images.opening import read_picture_file
from m2_encoder.data.samples.parse import SampleProblem
from m2_encoder.data.shards.index import IMAGE_EXTENSIONS, build_index
from m2_encoder.data.shards.names import walk_files
from m2_encoder.errors import ImageError, UserError
from m2_encoder.files import write_text

_IMAGES_PER_TASK = 256
_LINE = re.compile(r"(?P<sha>[0-9a-fA-F]{64})(?:\s+(?P<hash>[0-9a-fA-F]{16}|-)\s+(?P<color>[0-9a-fA-F]{6}))?(?:\s.*)?")


class EvaluationImages(NamedTuple):
    """Hashes of all evaluation images."""

    hashes: pa.Array  # SHA-256 of files, binary(32)
    perceptual: npt.NDArray[np.uint64]  # hashes of what they look like, (m,) uint64; images without one are left out
    colors: npt.NDArray[np.uint64]  # mean colours of those, 0xRRGGBB, (m,) uint64


class HashTask(NamedTuple):
    """Some files to hash."""

    output: str  # a hash list, with a line per image
    place: str  # what the user named
    files: tuple[str, ...]  # hash lists, tars or images
    max_pixels: int


def plan_hashes(places: Sequence[str], folder: Path, *, max_pixels: int) -> list[HashTask]:
    """Tasks that hash all images of hash lists, tars, and folders of images or tars (sub-folders included).

    Raises:
        UserError: for a place that does not exist or holds no image.
    """
    tasks: list[HashTask] = []
    for place in places:
        files = _list_files(Path(place).expanduser())
        if not files:
            raise UserError(f"evaluation images {place}: no image or tar in there")
        images = [str(file) for file in files if _is_image(file)]
        groups = [images[start : start + _IMAGES_PER_TASK] for start in range(0, len(images), _IMAGES_PER_TASK)]
        groups += [[str(file)] for file in files if not _is_image(file)]
        for group in groups:
            tasks.append(HashTask(str(folder / f"{len(tasks):06d}.txt"), place, tuple(group), max_pixels))
    return tasks


def hash_files(task: HashTask) -> None:
    """Write the hash list of some files.

    Raises:
        UserError: for a hash list with a line that is no hash.
    """
    write_hash_list(Path(task.output), [line for file in task.files for line in _lines_of(Path(file), task.max_pixels)])


def join_hashes(tasks: Iterable[HashTask]) -> list[str]:
    """Lines of the outputs of tasks that have run, sorted, each once.

    Raises:
        UserError: for a place without any.
    """
    lines: dict[str, set[str]] = {}
    for task in tasks:
        lines.setdefault(task.place, set()).update(_read_lines(Path(task.output)))
    for place, own in lines.items():
        if not own:
            raise UserError(f"evaluation images {place}: no image or hash in there")
    return sorted(set().union(*lines.values()))


def write_hash_list(path: Path, lines: Iterable[str]) -> None:
    """Write a hash list that `read_hash_list` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(f"{line}\n" for line in lines))


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


def _list_files(place: Path) -> list[Path]:
    """Images and tars of a folder, or what is named itself."""
    if not place.exists():
        raise UserError(f"evaluation images {place}: no such file or folder")
    if not place.is_dir():
        return [place]
    found = (Path(parent, name) for parent, names in walk_files(place) for name in names)
    return sorted(path for path in found if path.is_file() and (_is_image(path) or path.suffix == ".tar"))


def _is_image(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS


def _lines_of(file: Path, max_pixels: int) -> Iterator[str]:
    if file.suffix == ".tar":
        index = build_index(file)
        with file.open("rb") as tar:
            yield from (_line(read_member(tar, index[number].image), max_pixels) for number in range(len(index)))
    elif _is_image(file):
        yield _line(_read_image(file), max_pixels)
    else:
        for number, line in enumerate(_read_lines(file), start=1):
            if line.strip():
                match = _parse(file, number, line)
                yield " ".join(part.lower() for part in (match["sha"], match["hash"], match["color"]) if part)


def _read_image(file: Path) -> bytes:
    try:
        return read_picture_file(file)
    except ImageError as error:
        raise UserError(f"evaluation images {file}: {error.text}") from error


def _line(content: bytes, max_pixels: int) -> str:
    try:
        measure = measure_image(content, max_pixels=max_pixels)
    except SampleProblem:  # its bytes can still be met again
        return hashlib.sha256(content).hexdigest()
    look = "-" if measure.perceptual_hash is None else f"{measure.perceptual_hash:016x}"
    return f"{measure.image_hash.hex()} {look} {measure.mean_color:06x}"


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
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
