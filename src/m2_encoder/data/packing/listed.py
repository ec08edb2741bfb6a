"""Sources that list their records: folders of images, and CSV tables."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from m2_encoder.data.images.suffixes import PICTURE_SUFFIXES, RANKS
from m2_encoder.data.packing.csv_rows import read_rows
from m2_encoder.data.packing.encodings import find_encoding, find_separator
from m2_encoder.data.packing.records import (
    Columns,
    Failure,
    Place,
    Record,
    fail,
    locate_tables,
    read_row,
    stamp_files,
    stamp_images,
)
from m2_encoder.data.samples.parse import (
    CaptionText,
    SampleProblem,
    parse_json_object,
    parse_sample_text,
    repeats_name,
)
from m2_encoder.data.shards.names import decode_names, match_cases, walk_files
from m2_encoder.errors import UserError, name_some

logger = logging.getLogger(__name__)

_TEXT_SUFFIXES = (".json", ".txt")
_UNREAD_SUFFIXES = (".caption", ".captions", ".text", ".tags")  # that other tools write captions to
_MAX_LOOKED_AT = 100_000  # files, to say what a folder is

Item = TypeVar("Item")


def batched(items: Iterable[Item], size: int) -> Iterator[tuple[Item, ...]]:
    """Consecutive groups of `size` items; the last one holds the rest."""
    iterator = iter(items)
    while group := tuple(islice(iterator, size)):
        yield group


class ClassTexts(NamedTuple):
    """What a folder of a class gives its pictures."""

    captions: tuple[CaptionText, ...]
    identity: str  # that they share


@dataclasses.dataclass(frozen=True)
class FolderSlice:
    """Images of a folder with captions in files of the same name."""

    root: str
    images: tuple[str, ...]  # for each sample the path of its image in the folder, "" where there is only a text
    stems: tuple[str, ...]  # for each sample its path without suffix, as `names.decode_names` reads it
    repeated: tuple[bool, ...]  # for each sample whether another image of the same name came before it
    texts: tuple[tuple[str, str], ...]  # for each sample where its `.json` and its `.txt` are, if it has them
    language: str | None  # of `.txt` captions; None detects it
    extra: tuple[str, ...]  # keys of a `.json` that are kept
    classes: Mapping[str, ClassTexts] | None = None  # by the first folder of a path, in place of captions in files

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        """Of the names; `stamp` tells whether the files are still the same."""
        own = [] if self.classes is None else [self.classes]
        return hash_json(["folder", self.images, self.stems, self.repeated, self.language, self.extra, *own])

    def stamp(self) -> str:
        """Of images and captions."""
        names = [*filter(None, self.images), *(name for names in self.texts for name in names)]
        return stamp_files(os.path.join(self.root, name) for name in names)

    def read(self) -> Iterator[Record | Failure]:
        """Read the captions; images are read later."""
        for image, stem, repeated, texts in zip(self.images, self.stems, self.repeated, self.texts, strict=True):
            name = stem + os.path.splitext(image)[1]
            if not image:
                yield Failure(stem, "missing_image", f"a caption without one of {', '.join(PICTURE_SUFFIXES)}")
            elif repeated:
                used = f"another picture is called {stem}, too, and used: of several the first of"
                yield Failure(name, "duplicate_key", f"{used} {', '.join(PICTURE_SUFFIXES[:7])} and so on")
            elif self.classes is not None:
                yield self._read_class(self.classes, image, stem, name)
            else:
                yield self._read_one(image, stem, name, texts)

    def _read_class(self, classes: Mapping[str, ClassTexts], image: str, stem: str, name: str) -> Record | Failure:
        folder, _, rest = image.partition("/")
        if not rest:
            return Failure(name, "missing_caption", "lies in no folder of a class")
        own = classes[folder]
        return Record(name, os.path.join(self.root, image), own.captions, stem, {}, identity=own.identity)

    def _read_one(self, image: str, stem: str, name: str, texts: tuple[str, str]) -> Record | Failure:
        try:
            found = [_read_if_there(os.path.join(self.root, text)) for text in texts]
            text = parse_sample_text(found[0], found[1], language=self.language)
            metadata = {} if found[0] is None or not self.extra else parse_json_object(found[0])
        except SampleProblem as problem:
            return fail(name, problem)
        extra = {name: metadata[name] for name in self.extra if name in metadata}
        path = os.path.join(self.root, image)
        identity = text.identity if text.is_marked else None
        mark = text.metadata.get("key", text.identity)
        key = stem if text.identity is None or repeats_name(mark, stem) else text.identity
        return Record(name, path, text.captions, key, extra, text.left_out, identity)


def slice_folder(
    folder: Path,
    size: int,
    *,
    language: str | None = None,
    extra: Sequence[str] = (),
    classes: Mapping[str, ClassTexts] | None = None,
) -> Iterator[FolderSlice]:
    """Cut a folder, with all below it, into slices; samples are sorted by path.

    Hidden files and folders, and what systems leave behind, are left out; links to folders are not followed. With
    `classes`, by the names of the folders in it, texts beside pictures are not read, which is said.

    Raises:
        UserError: if it holds no image, or cannot be read.
    """
    samples, unread = _list_samples(folder)
    if not any(sample.image for sample in samples):
        raise UserError(f"{folder}: no image in it; known suffixes: {', '.join(PICTURE_SUFFIXES)}")
    if classes is None:
        _warn_of_second_texts(samples, unread)
    else:
        samples = [sample for sample in samples if sample.image]
        beside = (text for sample in samples for text in sample.texts if (folder / text).is_file())
        if (first := next(beside, None)) is not None:
            logger.warning("texts beside pictures, such as %s, are not read: their classes give the captions", first)
    keys = iter(decode_names([os.fsencode(sample.stem) for sample in samples]))
    for group in batched(samples, size):
        images, stems, repeated, texts, _ = zip(*group, strict=True)
        own = tuple(islice(keys, len(stems)))
        named = {image.partition("/")[0] for image in images}
        used = None if classes is None else {name: each for name, each in classes.items() if name in named}
        yield FolderSlice(str(folder), images, own, repeated, texts, language, tuple(extra), used)


def has_pair(folder: Path) -> bool:
    """Whether an image with captions in a file of the same name is among the first 100,000 files below a folder."""
    seen = 0
    for _, names in _walk(folder):
        stems: dict[str, set[bool]] = {}
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in (*PICTURE_SUFFIXES, *_TEXT_SUFFIXES):
                stems.setdefault(stem, set()).add(suffix.lower() in PICTURE_SUFFIXES)
        seen += len(names)
        if any(len(kinds) == 2 for kinds in stems.values()):
            return True
        if seen > _MAX_LOOKED_AT:
            return False
    return False


class _Listed(NamedTuple):
    image: str  # path in the folder; "" for a text alone
    stem: str  # path without suffix
    repeated: bool  # whether another image of this stem came before
    texts: tuple[str, str]  # paths of `.json` and `.txt`, whether they are there or not
    has_both: bool  # whether both are there


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Folders with the names of their files, without hidden ones and what systems leave behind."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: the folder cannot be read: {error.strerror}") from error

    yield from walk_files(folder, onerror=refuse)


def _list_samples(folder: Path) -> tuple[list[_Listed], list[str]]:
    """Images and lonely texts, sorted by stem, and the texts of images that are not read."""
    images: list[tuple[str, str]] = []
    texts: dict[str, dict[str, str]] = {}
    second: list[tuple[str, str]] = []
    for parent, files in _walk(folder):
        tables = {name.removesuffix(".parquet") for name in files if name.endswith(".parquet")}
        for name in files:
            path = os.path.relpath(os.path.join(parent, name), folder).replace(os.sep, "/")
            stem, suffix = os.path.splitext(path)
            if suffix.lower() in PICTURE_SUFFIXES:
                images.append((stem, suffix))
            elif suffix.lower() in _TEXT_SUFFIXES and name.removesuffix("_stats.json") not in tables:  # of img2dataset
                own = texts.setdefault(stem, {})
                used = path if suffix.islower() else own.get(suffix.lower(), path)
                if suffix.lower() in own:
                    second.append((stem, own[suffix.lower()] if used == path else path))
                own[suffix.lower()] = used
            elif suffix.lower() in _UNREAD_SUFFIXES:
                second.append((stem, path))
    stems = {stem for stem, _ in images}
    for text, image in match_cases(texts.keys() - stems, stems - texts.keys()).items():
        texts[image] = texts.pop(text)
    samples = []
    previous = None
    for stem, suffix in sorted(images, key=lambda item: (item[0], RANKS[item[1].lower()], item[1])):
        samples.append(
            _Listed(stem + suffix, stem, stem == previous, _paths(stem, texts), len(texts.get(stem, ())) == 2)
        )
        previous = stem
    lonely = texts.keys() - stems
    samples += [_Listed("", stem, False, _paths(stem, texts), False) for stem in lonely]
    unread = [path for stem, path in second if stem in stems or stem in texts]
    return sorted(samples, key=lambda sample: sample.stem), unread


def _warn_of_second_texts(samples: Sequence[_Listed], unread: Sequence[str]) -> None:
    """Say which captions are not read because their picture has others, or for their suffix."""
    both = [sample.texts[1] for sample in samples if sample.has_both]
    for names, rule in (
        (unread, "are not read: captions stand in one .txt or .json of the picture's name"),
        (both, "count only where the .json of the same name has no captions"),
    ):
        if names:
            logger.warning("%d texts beside pictures %s: %s", len(names), rule, name_some(names, 3, 60))


def _paths(stem: str, texts: Mapping[str, Mapping[str, str]]) -> tuple[str, str]:
    own = texts.get(stem, {})
    json_path, text_path = (own.get(suffix, stem + suffix) for suffix in _TEXT_SUFFIXES)
    return json_path, text_path


def _read_if_there(path: str) -> bytes | None:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise SampleProblem("missing_caption", f"{path} is not a regular file")
        return Path(path).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SampleProblem("missing_caption", f"{path} cannot be read: {error.strerror}") from error


@dataclasses.dataclass(frozen=True)
class RowSlice:
    """Rows of a CSV table."""

    place: Place
    first_row: int  # number of the first row, for the list of failures; the header is 0
    header: tuple[str, ...]  # names of the columns
    rows: tuple[tuple[str, ...], ...]
    columns: Columns

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """Of the values and what they mean."""
        return hash_json(["csv", self.place[1:], self.header, self.rows, self.columns])

    def stamp(self) -> str:
        """Of the images that rows name."""
        return stamp_images(self.read())

    def read(self) -> Iterator[Record | Failure]:
        """Give the rows as records."""
        for number, row in enumerate(self.rows, start=self.first_row):
            name = f"{self.place.name}: row {number}"
            if any(map(_is_damaged, row)):
                advice = "if the whole table is in another encoding, name it, such as encoding=gb18030"
                yield Failure(name, "not_utf8", f"holds bytes that are not UTF-8; {advice}")
            elif len(row) != len(self.header):
                yield Failure(name, "wrong_type", f"{len(row)} fields, the header has {len(self.header)}")
            else:
                yield read_row(dict(zip(self.header, row, strict=True)), self.columns, name, self.place)


def slice_csv(
    paths: Sequence[Path], size: int, columns: Columns, *, root: str | None = None, encoding: str | None = None
) -> Iterator[RowSlice]:
    """Cut CSV or TSV files with a header into slices, none of which spans two files.

    `.csv` is separated by commas and `.tsv` by tabs, unless their header has other separators alone; quotation marks
    are those of RFC 4180, where they can be. Relative paths of images count from `root`, by default the folder of each
    file. Without an `encoding`, each file has that of `encodings.find_encoding`.

    Raises:
        UserError: if a file is empty, has no column with images or captions, or is not in the encoding.
    """
    is_said = False
    for path, place in locate_tables(paths, root):
        found = encoding or find_encoding(path)
        if encoding is None and found != "utf-8-sig" and not is_said:
            logger.warning("%s is read as %s, as are others like it; say encoding=NAME if that is wrong", path, found)
            is_said = True
        try:
            yield from _slice_table(path, size, columns, place, found)
        except UnicodeError as error:
            raise UserError(f"{path}: is not in this encoding ({error})", key="encoding", value=found) from error


def _slice_table(path: Path, size: int, columns: Columns, place: Place, encoding: str) -> Iterator[RowSlice]:
    # surrogateescape: bytes that are not UTF-8 spoil one row, not the file.
    errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
    with path.open(encoding=encoding, errors=errors, newline="") as file:
        first = next((line for line in file if line.strip()), "").removeprefix("\ufeff")
        separator = find_separator(first, "\t" if path.suffix.lower() == ".tsv" else ",")
        rows = read_rows(chain([first], file), separator)
        header = next(rows, None)
        if header is None:
            raise UserError(f"{path}: is empty; its first row must name the columns")
        columns.check(header, str(path))
        first_row = 1
        for group in batched(rows, size):
            yield RowSlice(place, first_row, header, group, columns)
            first_row += len(group)


def _is_damaged(field: str) -> bool:
    return any("\udc80" <= sign <= "\udcff" for sign in field) if not field.isascii() else False


def hash_json(value: Any) -> str:
    """SHA-256 of plain data."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
