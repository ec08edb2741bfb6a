"""Inputs of m2-embed: image files of a folder, lines of a text file. Nothing is decoded here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from m2_encoder.data.images.opening import FORMATS, name_format
from m2_encoder.data.images.suffixes import PICTURE_SUFFIXES
from m2_encoder.data.shards.names import walk_files
from m2_encoder.errors import UserError
from m2_encoder.evaluation.embedding import Item

_BESIDE = frozenset(
    (".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".xml", ".xmp", ".yaml", ".yml", ".html", ".htm", ".ini", ".db",
     ".log", ".parquet", ".safetensors", ".npy", ".npz", ".tar", ".index", ".py")
)  # fmt: skip
"""Suffixes of what lies beside pictures without being one, such as captions: left out without a word."""

_HEAD_BYTES = 1024  # tell a format

MAX_LINE_BYTES = 2**20
"""Longer lines are skipped."""

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_UTF8_MARK = b"\xef\xbb\xbf"


def list_images(folder: Path) -> list[Item]:
    """All image files below a folder, sorted by relative path, as `names.walk_files` gives them.

    Links to files are followed, links to folders are not. Files and folders that cannot be opened carry the reason, and
    so do files that are not read for their names; what usually lies beside pictures, such as `.txt`, is left out.
    """
    found: list[tuple[str, str]] = []

    def note_unreadable(error: OSError) -> None:
        found.append((str(error.filename), f"the folder cannot be read: {error.strerror}"))

    for parent, files in walk_files(folder, onerror=note_unreadable):
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in _BESIDE:
                continue
            path, why = os.path.join(parent, name), ""
            if not os.path.isfile(path):
                why = "not a regular file" if os.path.exists(path) else "a link to nothing"
            elif suffix not in PICTURE_SUFFIXES:
                why = _describe_other(path, suffix)
            if why or suffix in PICTURE_SUFFIXES:
                found.append((path, why))
    relative = sorted((os.path.relpath(path, folder).replace(os.sep, "/"), path, why) for path, why in found)
    return [
        # File names may hold bytes that are no text; these are escaped.
        Item(place, name.encode("utf-8", "backslashreplace").decode("utf-8"), Path(path), why)
        for place, (name, path, why) in enumerate(relative)
    ]


def _describe_other(path: str, suffix: str) -> str:
    """Why a regular file is not read; "" for a nameless kind, which is nothing that anybody would miss."""
    try:
        with open(path, "rb") as file:
            kind = name_format(file.read(_HEAD_BYTES))
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if kind in FORMATS:
        return f"its content is {kind}, but {suffix or 'a name without a suffix'} is none of a picture: rename it"
    if kind.startswith("something unknown"):
        return f"{suffix} is no suffix of a picture that is read here" if suffix else ""
    return f"is {kind}, no picture that is read here"


def read_lines(path: Path) -> Iterator[Item]:
    """Lines of a text file. A usable text is its own name; other lines are named by number and carry the reason.

    Lines end with LF or CRLF; a byte order mark is dropped. Blank lines keep their place and are skipped.

    Raises:
        UserError: if the file cannot be read, or is UTF-16.
    """
    try:
        with path.open("rb") as file:
            place = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                if place == 0:
                    if line.startswith(_UTF16_MARKS):
                        raise UserError(f"{path} is UTF-16; convert it with: iconv -f utf-16 -t utf-8")
                    line = line.removeprefix(_UTF8_MARK)
                yield _line_item(place, line)
                while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE_BYTES + 1)
                place += 1
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _line_item(place: int, line: bytes) -> Item:
    name = f"line {place + 1}"
    if len(line) > MAX_LINE_BYTES:
        return Item(place, name, "", f"longer than {MAX_LINE_BYTES:,} bytes")
    try:
        text = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        hint = "convert the file, for example with: iconv -f gb18030 -t utf-8"
        return Item(place, name, "", f"not UTF-8 at byte {error.start + 1}; {hint}")
    if not text.strip():
        return Item(place, name, "", "blank")
    return Item(place, text, text)
