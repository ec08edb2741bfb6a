"""Samples of an evaluation set, one after the other, and an error for the first that cannot be used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from m2_encoder.data.images.limits import ImageLimits, open_pixels
from m2_encoder.data.images.opening import read_picture_file
from m2_encoder.data.images.suffixes import PICTURE_SUFFIXES
from m2_encoder.data.packing.download import DownloadOptions
from m2_encoder.data.packing.records import Columns, Failure, Record, Slice
from m2_encoder.data.packing.shards import fetch_images
from m2_encoder.data.packing.sources import find_source
from m2_encoder.data.samples.parse import SampleProblem, SampleText, parse_sample_text
from m2_encoder.data.shards.names import is_clutter, walk_files
from m2_encoder.data.shards.paths import list_shards
from m2_encoder.data.shards.reader import OpenShard
from m2_encoder.errors import ImageError, UserError

_RECORDS = 1000  # that are read at a time
_RECORDS_TO_KEEP = 200  # fewer where the images of a table's rows stay in memory, see `read_place`
_WANTED = "give tars, a folder of images with .txt or .json of the same name beside them, or a table"


class ImagePlace(NamedTuple):
    """Where an image lies, to be read when it is wanted."""

    path: str  # its file or url, or the tar that holds it
    offset: int = 0  # where its bytes start
    size: int | None = None  # how many there are; None is the whole file
    rows: Slice | None = None  # of the table that holds it
    row: int = 0  # number of its row among these


class SetSample(NamedTuple):
    """One sample as it is stored."""

    origin: str  # its place, as "shard:key"
    shard: str  # the tar, or the source, that it lies in
    key: str  # the name of its files there
    image: bytes  # the image file
    text: SampleText
    place: ImagePlace


def read_samples(source: str | os.PathLike[str], *, images: bool = True) -> Iterator[SetSample]:
    """Every sample of the tars of a folder, sorted by name; without tars, those that `m2-data pack` would write.

    Nothing is written, and images are the files themselves, whatever their format. `source` may also be a tar or a
    pattern of tars. Without `images`, those in files of their own and in tars are not read: b"".

    Raises:
        UserError: for a source without samples, and for anything unusable, by name.
    """
    where = os.fspath(source)
    shards = list_tars(where)
    return _read_tars(where, shards, images=images) if shards else _read_unpacked(where, images=images)


def read_place(place: ImagePlace) -> bytes:
    """The image at a place.

    Raises:
        OSError, UserError: if it is not there any more.
    """
    if place.rows is not None:
        image = _images_of(place.rows)[place.row]  # type: ignore[arg-type]  # slices are frozen
        assert image is not None, "a place names a row with an image"
        return image
    if place.size is None:
        try:
            return read_picture_file(place.path)
        except ImageError as error:
            raise UserError(f"{place.path}: {error}") from error
    with open(place.path, "rb") as file:
        content = os.pread(file.fileno(), place.size, place.offset)
    if len(content) != place.size:
        raise UserError(f"{place.path}: is shorter than it was, {len(content)} of {place.size} bytes at {place.offset}")
    return content


@lru_cache(maxsize=1)
def _images_of(rows: Slice) -> tuple[bytes | None, ...]:
    """Images of the rows that were read last: who reads one mostly reads the next one, too."""
    images = (record.image if isinstance(record, Record) else None for record in rows.read())
    return tuple(image if isinstance(image, bytes) else None for image in images)


def describe_source(source: str) -> str | None:
    """What is wrong with a source before any of its files is opened; None if `read_samples` may try it."""
    try:
        if list_tars(source):
            return None
        found = find_source(source, columns=Columns())
    except UserError as error:
        return " ".join(f"{error.text}; {_WANTED}".split())
    if found.format == "folder" and not _has_image(found.paths[0]):
        return f"no *.tar there, and no image; {_WANTED}"
    return None


def _has_image(folder: Path) -> bool:
    return any(name.lower().endswith(PICTURE_SUFFIXES) for _, names in walk_files(folder) for name in names)


def list_tars(source: str) -> list[str]:
    """The tars of a source, sorted by name; none for one to pack."""
    if os.path.isdir(source):
        return sorted(str(path) for path in Path(source).glob("*.tar") if not is_clutter(path.name))
    return list_shards(source) if source.endswith(".tar") else []


def _read_tars(folder: str, shards: list[str], *, images: bool) -> Iterator[SetSample]:
    is_empty = True
    for shard in shards:
        with closing(_open(shard)) as tar:
            for number in range(len(tar.index)):
                origin = shard
                try:
                    raw = tar.read(number, image=images)
                    origin = f"{shard}:{raw.key}"
                    text = parse_sample_text(raw.json, raw.text)
                except SampleProblem as problem:
                    raise UserError(f"{origin}: {problem}; write the shard again") from problem
                place = tar.index[number].image
                yield SetSample(origin, shard, raw.key, raw.image, text, ImagePlace(shard, place.offset, place.size))
                is_empty = False
    if is_empty:
        raise UserError(f"{folder}: no samples in its {len(shards)} tar(s)")


def _read_unpacked(where: str, *, images: bool) -> Iterator[SetSample]:
    """Images of a folder with captions beside them, or rows of tables, with the readers and defaults of packing."""
    try:
        for part in find_source(where, columns=Columns()).slices(_RECORDS if images else _RECORDS_TO_KEEP):
            records = part.read()
            pairs = fetch_images(records, DownloadOptions()) if images else ((record, None) for record in records)
            for row, (record, image) in enumerate(pairs):
                yield _unpacked_sample(where, record, image, part, row)
    except SampleProblem as problem:
        raise UserError(
            f"{where}: {problem.detail} ({problem.reason}); an evaluation skips nothing: mend it, or pack what can be "
            "used with m2-data pack"
        ) from problem
    except UserError as error:
        raise UserError(f"no *.tar in {where}, and {error.text}; {_WANTED}") from error


def _unpacked_sample(
    where: str, record: Record | Failure, image: bytes | SampleProblem | None, part: Slice, row: int
) -> SetSample:
    if isinstance(record, Failure):
        raise SampleProblem(record.reason, f"{record.name}: {record.detail}")
    try:
        if isinstance(image, SampleProblem):
            raise image
        if image is not None:
            with open_pixels(image, ImageLimits()):  # its header; the set decodes it, as the model's policy says
                pass
    except SampleProblem as problem:
        raise SampleProblem(problem.reason, f"{record.name}: {problem.detail}") from problem
    mark = record.key if record.identity is None else record.identity
    text = SampleText(record.captions, mark, record.identity is not None, {}, record.left_out)
    if isinstance(record.image, bytes):
        return SetSample(
            f"{where}: {record.name}",
            where,
            record.name,
            record.image,
            text,
            ImagePlace("", 0, len(record.image), part, row),
        )
    return SetSample(f"{where}: {record.name}", where, record.name, image or b"", text, ImagePlace(record.image))


def _open(shard: str) -> OpenShard:
    """A tar in which everything is usable, as far as its headers tell; its folder is left as it is."""
    try:
        tar = OpenShard(shard, write_index=False)
    except (OSError, SampleProblem) as error:
        raise UserError(f"{shard}: not a readable tar ({error}); write the shard again") from error
    if tar.index.faults:
        tar.close()
        key, reason, detail = tar.index.faults[0]
        place = shard if key is None else f"{shard}:{key}"
        raise UserError(f"{place}: {reason} ({detail}); an evaluation skips nothing: write the shard again")
    return tar
