"""Sources with one record per line: JSON lines, and Chinese-CLIP's pair of files."""

from __future__ import annotations

import base64
import binascii
import codecs
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from m2_encoder.data.packing.listed import batched, hash_json
from m2_encoder.data.packing.records import (
    Columns,
    Failure,
    Place,
    Record,
    fail,
    locate_tables,
    read_row,
    stamp_images,
)
from m2_encoder.data.samples.parse import SampleProblem, describe_missing, gather, parse_json_object
from m2_encoder.errors import UserError

_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_LINES_LOOKED_AT = 100  # of a file, for the keys of its objects


@dataclasses.dataclass(frozen=True)
class JsonLinesSlice:
    """Consecutive lines of a JSON lines file."""

    place: Place
    path: str
    offset: int  # where the first line starts, bytes
    size: int
    first_line: int  # number of the first line, from 1
    num_lines: int  # how many, blank ones included
    digest: str  # of the lines
    columns: Columns  # what their keys mean

    def __len__(self) -> int:
        return self.num_lines

    def fingerprint(self) -> str:
        """Of the lines and what their keys mean."""
        return hash_json(["jsonl", self.place[1:], self.digest, self.num_lines, self.columns])

    def stamp(self) -> str:
        """Of the images that lines name."""
        return stamp_images(self.read())

    def read(self) -> Iterator[Record | Failure]:
        """Parse the lines."""
        for number, line in enumerate(_read_lines(self.path, self.offset, self.size), start=self.first_line):
            if not line.strip():
                continue
            name = f"{self.place.name}: line {number}"
            try:
                yield read_row(parse_json_object(line), self.columns, name, self.place)
            except SampleProblem as problem:
                yield fail(name, problem)


def slice_json_lines(
    paths: Sequence[Path], size: int, columns: Columns, *, root: str | None = None
) -> Iterator[JsonLinesSlice]:
    """Cut JSON lines files into slices, none of which spans two files.

    Relative paths of images count from `root`, by default the folder of each file.

    Raises:
        UserError: if a file is empty, or its first lines are no JSON or lack images or captions.
    """
    for path, place in locate_tables(paths, root):
        _refuse_utf16(path)
        with path.open("rb") as file:
            _check_start(path, file, columns)
            for offset, length, digest, first_line, lines in _slices(file, size):
                yield JsonLinesSlice(place, str(path), offset, length, first_line, len(lines), digest, columns)


def _refuse_utf16(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(f"{path}: is UTF-16; convert it with iconv -f utf-16 -t utf-8")


def _check_start(path: Path, file: BinaryIO, columns: Columns) -> None:
    """Refuse a file whose first lines hold no pair at all; single bad lines are failures like later ones."""
    seen: dict[str, None] = {}
    first_problem = "no line in it"
    problems = 0
    for number, line in enumerate(islice(file, _LINES_LOOKED_AT), start=1):
        if not line.strip():
            continue
        try:
            seen |= dict.fromkeys(parse_json_object(line))
        except SampleProblem as problem:
            problems += 1
            first_problem = first_problem if problems > 1 else f"line {number}: {problem.reason}: {problem.detail}"
    file.seek(0)
    if not seen:
        fix = "; convert the file, such as with iconv -f gb18030 -t utf-8" if "not_utf8" in first_problem else ""
        raise UserError(f"{path}: {first_problem}; each line must be a JSON object{fix}")
    columns._replace(extra=()).check(list(seen), str(path))


@dataclasses.dataclass(frozen=True)
class ChineseClipSlice:
    """Consecutive lines of Chinese-CLIP's image file, with their captions."""

    path: str  # the file, `id<TAB>base64` a line
    offset: int
    size: int  # of the lines, bytes
    digest: str  # of the lines
    first_line: int  # number of the first line, from 1
    texts: tuple[tuple[str, ...] | None, ...]  # for each line its captions; None where the image came before
    unseen: tuple[str, ...]  # ids that texts name and that have no line; they follow the lines
    language: str | None  # of the captions; None detects it

    def __len__(self) -> int:
        return len(self.texts) + len(self.unseen)

    def fingerprint(self) -> str:
        """Of images and captions."""
        return hash_json(["chinese_clip", self.digest, self.texts, self.unseen, self.language])

    def stamp(self) -> str:
        """Nothing: images are in the file."""
        return ""

    def read(self) -> Iterator[Record | Failure]:
        """Decode the images."""
        file_name = Path(self.path).name
        lines = _read_lines(self.path, self.offset, self.size)
        for number, (line, texts) in enumerate(zip(lines, self.texts, strict=True), start=self.first_line):
            yield self._read_line(line, texts, f"{file_name}: line {number}")
        for key in self.unseen:
            yield Failure(f"image {key}", "missing_image", f"texts name it, {file_name} does not have it")

    def _read_line(self, line: bytes, texts: tuple[str, ...] | None, name: str) -> Record | Failure:
        key, tab, encoded = line.removeprefix(codecs.BOM_UTF8).partition(b"\t")
        if not tab:
            return Failure(name, "wrong_type", "no tab; a line is id<TAB>base64")
        shown = key.decode("utf-8", "backslashreplace")
        if texts is None:
            return Failure(name, "duplicate_key", f"image {shown} came before")
        try:
            found = gather([(texts, self.language, None)], "the text")
            if not found.kept:
                detail = describe_missing(found.left_out) or f"no text names image {shown}"
                raise SampleProblem("missing_caption", detail, found.left_out)
            image = base64.b64decode(encoded.strip().translate(_URL_SAFE), validate=True)
        except SampleProblem as problem:
            return fail(name, problem)
        except binascii.Error as error:
            return Failure(name, "undecodable_image", f"image {shown} is not base64: {error}")
        return Record(name, image, found.kept, shown, {}, found.left_out)


def slice_chinese_clip(
    images: Path, texts: Path, size: int, *, language: str | None = None
) -> Iterator[ChineseClipSlice]:
    """Cut Chinese-CLIP's format into slices.

    `images` has `id<TAB>base64` a line; `texts` is JSON lines {"text_id": …, "text": …, "image_ids": […]}, held in
    memory.

    Raises:
        UserError: if a line of `texts` cannot be read: each may name several images, so none can be left out.

    Source: the data format of github.com/OFA-Sys/Chinese-CLIP.
    """
    _refuse_utf16(texts)
    _refuse_utf16(images)
    by_image = _read_texts(texts)
    taken: set[str] = set()
    with images.open("rb") as file:
        end = next_line = 0
        for offset, length, digest, first_line, lines in _slices(file, size):
            captions = tuple(_take(line, by_image, taken) for line in lines)
            yield ChineseClipSlice(str(images), offset, length, digest, first_line, captions, (), language)
            end, next_line = offset + length, first_line + len(lines)
    if not end:
        raise UserError(f"{images}: is empty; a line is id<TAB>base64")
    for group in batched(sorted(set(by_image) - taken), size):
        yield ChineseClipSlice(str(images), end, 0, "", next_line, (), group, language)


def _take(line: bytes, by_image: Mapping[str, list[str]], taken: set[str]) -> tuple[str, ...] | None:
    key = line.removeprefix(codecs.BOM_UTF8).partition(b"\t")[0].decode("utf-8", "backslashreplace")
    if key in taken:
        return None
    taken.add(key)
    return tuple(by_image.get(key, ()))


def _read_texts(path: Path) -> dict[str, list[str]]:
    by_image: dict[str, list[str]] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            text, keys = _parse_text_line(line, f"{path}, line {number}")
            for key in keys:
                by_image.setdefault(str(key), []).append(text)
    if not by_image:
        raise UserError(f'{path}: no text in it; a line is {{"text_id": 1, "text": "…", "image_ids": [2]}}')
    return by_image


def _parse_text_line(line: bytes, where: str) -> tuple[str, list[Any]]:
    try:
        row = parse_json_object(line)
    except SampleProblem as problem:
        raise UserError(f"{where}: {problem.reason}: {problem.detail}; mend or remove the line") from None
    text, keys = row.get("text"), row.get("image_ids")
    if not isinstance(text, str) or not isinstance(keys, list):
        raise UserError(f"{where}: has {json.dumps(row, ensure_ascii=False)[:80]}; wanted a text and a list image_ids")
    return text, keys


def _slices(file: BinaryIO, size: int) -> Iterator[tuple[int, int, str, int, tuple[bytes, ...]]]:
    """Offset, length, hash, first line number and lines of each run of `size` lines of a file."""
    offset, first_line = 0, 1
    for lines in batched(file, size):
        content = b"".join(lines)
        yield offset, len(content), hashlib.blake2b(content, digest_size=16).hexdigest(), first_line, lines
        offset, first_line = offset + len(content), first_line + len(lines)


def _read_lines(path: str, offset: int, size: int) -> list[bytes]:
    """Lines in a part of a file, as iterating over it gives them: they end with a line feed alone."""
    with open(path, "rb") as file:
        file.seek(offset)
        content = file.read(size)
    lines = content.split(b"\n")
    return lines[:-1] if content.endswith(b"\n") else lines if content else []
