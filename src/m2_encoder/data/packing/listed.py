"""Sources that list their records: folders of images, and CSV tables."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from m2_encoder.data.packing.csv_rows import read_rows
from m2_encoder.data.packing.records import Columns, Failure, Record, fail, read_row, stamp_files, stamp_images
from m2_encoder.data.samples.parse import SampleProblem, parse_json_object, parse_sample_text
from m2_encoder.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
"""Files of a folder that count as images, in lower or upper case."""

_TEXT_SUFFIXES = (".json", ".txt")

Item = TypeVar("Item")


def batched(items: Iterable[Item], size: int) -> Iterator[tuple[Item, ...]]:
    """Consecutive groups of `size` items; the last one holds the rest."""
    iterator = iter(items)
    while group := tuple(islice(iterator, size)):
        yield group


@dataclasses.dataclass(frozen=True)
class FolderSlice:
    """Images of a folder with captions in files of the same name."""

    root: str
    images: tuple[str, ...]  # for each sample the path of its image in the folder, "" where there is only a text
    stems: tuple[str, ...]  # for each sample its path without suffix
    repeated: tuple[bool, ...]  # for each sample whether another image of the same name came before it
    language: str | None  # of `.txt` captions; None detects it
    extra: tuple[str, ...]  # keys of a `.json` that are kept

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        """Of the names; `stamp` tells whether the files are still the same."""
        return hash_json(["folder", self.images, self.stems, self.repeated, self.language, self.extra])

    def stamp(self) -> str:
        """Of images and captions."""
        names = [*filter(None, self.images), *(stem + suffix for stem in self.stems for suffix in _TEXT_SUFFIXES)]
        return stamp_files(os.path.join(self.root, name) for name in names)

    def read(self) -> Iterator[Record | Failure]:
        """Read the captions; images are read later."""
        for image, stem, repeated in zip(self.images, self.stems, self.repeated, strict=True):
            if not image:
                yield Failure(stem, "missing_image", f"a caption without one of {', '.join(IMAGE_SUFFIXES)}")
            elif repeated:
                yield Failure(image, "duplicate_key", f"another image is called {stem}, too")
            else:
                yield self._read_one(image, stem)

    def _read_one(self, image: str, stem: str) -> Record | Failure:
        try:
            found = [_read_if_there(os.path.join(self.root, stem + suffix)) for suffix in _TEXT_SUFFIXES]
            text = parse_sample_text(found[0], found[1], language=self.language)
            metadata = {} if found[0] is None or not self.extra else parse_json_object(found[0])
        except SampleProblem as problem:
            return fail(image, problem)
        extra = {name: metadata[name] for name in self.extra if name in metadata}
        path = os.path.join(self.root, image)
        return Record(image, path, text.captions, text.identity or stem, extra, text.left_out)


def slice_folder(
    folder: Path, size: int, *, language: str | None = None, extra: Sequence[str] = ()
) -> Iterator[FolderSlice]:
    """Cut a folder, with all below it, into slices; samples are sorted by path.

    Hidden files and folders are left out; links to folders are not followed.

    Raises:
        UserError: if it holds no image, or cannot be read.
    """
    samples = _list_samples(folder)
    if not any(image for image, _, _ in samples):
        raise UserError(f"{folder}: no image in it; known suffixes: {', '.join(IMAGE_SUFFIXES)}")
    for group in batched(samples, size):
        images, stems, repeated = zip(*group, strict=True)
        yield FolderSlice(str(folder), images, stems, repeated, language, tuple(extra))


def _list_samples(folder: Path) -> list[tuple[str, str, bool]]:
    """Path of the image, or "", path without suffix, and whether the latter came before; sorted."""
    images: list[tuple[str, str]] = []
    texts: set[str] = set()

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: the folder cannot be read: {error.strerror}") from error

    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            stem, suffix = os.path.splitext(os.path.relpath(os.path.join(parent, name), folder).replace(os.sep, "/"))
            if name.startswith("."):
                continue
            if suffix.lower() in IMAGE_SUFFIXES:
                images.append((stem, suffix))
            elif suffix in _TEXT_SUFFIXES:
                texts.add(stem)
    samples = []
    previous = None
    for stem, suffix in sorted(images):
        samples.append((stem + suffix, stem, stem == previous))
        previous = stem
    lonely = texts - {stem for stem, _ in images}
    return sorted([*samples, *(("", stem, False) for stem in lonely)], key=lambda item: (item[1], item[0]))


def _read_if_there(path: str) -> bytes | None:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SampleProblem("missing_caption", f"{path} cannot be read: {error.strerror}") from error


@dataclasses.dataclass(frozen=True)
class RowSlice:
    """Rows of a CSV table."""

    root: str  # relative paths of images count from here
    name: str  # of the table's file
    first_row: int  # number of the first row, for the list of failures; the header is 0
    header: tuple[str, ...]  # names of the columns
    rows: tuple[tuple[str, ...], ...]
    columns: Columns

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """Of the values and what they mean."""
        return hash_json(["csv", self.header, self.rows, self.columns])

    def stamp(self) -> str:
        """Of the images that rows name."""
        return stamp_images(self.read())

    def read(self) -> Iterator[Record | Failure]:
        """Give the rows as records."""
        for number, row in enumerate(self.rows, start=self.first_row):
            name = f"{self.name}: row {number}"
            if len(row) != len(self.header):
                yield Failure(name, "wrong_type", f"{len(row)} fields, the header has {len(self.header)}")
            else:
                yield read_row(dict(zip(self.header, row, strict=True)), self.columns, name, self.root)


def slice_csv(paths: Sequence[Path], size: int, columns: Columns, *, root: str | None = None) -> Iterator[RowSlice]:
    """Cut CSV or TSV files with a header into slices, none of which spans two files.

    `.tsv` is separated by tabs; quotation marks are those of RFC 4180, where they can be. Relative paths of images
    count from `root`, by default the folder of each file.

    Raises:
        UserError: if a file is empty or lacks a column with images or captions.
    """
    for path in paths:
        # surrogateescape: bytes that are not UTF-8 spoil one row, not the file.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = read_rows(file, "\t" if path.suffix.lower() == ".tsv" else ",")
            header = next(rows, None)
            if header is None:
                raise UserError(f"{path}: is empty; its first row must name the columns")
            if len(header) == 1 and (other := next((sign for sign in "\t;," if sign in header[0]), None)):
                raise UserError(
                    f"{path}: its only column is {header[0]!r}, with {other!r} in it: a .csv is separated by commas, "
                    "a .tsv by tabs; rename or convert it"
                )
            columns.check(header, str(path))
            first_row = 1
            for group in batched(rows, size):
                yield RowSlice(root or str(path.parent), path.name, first_row, header, group, columns)
                first_row += len(group)


def hash_json(value: Any) -> str:
    """SHA-256 of plain data."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
