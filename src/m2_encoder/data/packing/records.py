"""Records of any kind of source, and the slices of records that become one shard each.

The main process cuts a source into slices of paths, offsets or names; workers read, check and write the records.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from m2_encoder.data.packing.values import find_numbered, is_missing, plain_number
from m2_encoder.data.samples.language import language_of_column, read_language
from m2_encoder.data.samples.parse import (
    LANGUAGE_KEYS,
    Captions,
    CaptionText,
    SampleProblem,
    captions_by_column,
    describe_missing,
    gather,
    is_caption_column,
    open_text,
    read_identity,
)
from m2_encoder.errors import UserError

_EMBEDDED = ("jpg", "jpeg", "png", "webp")  # columns of img2dataset, with bytes
_IMAGE_COLUMNS = (
    f"image img picture image_path img_path filepath file_name filename file path image_bytes {' '.join(_EMBEDDED)} "
    "图片 图像 image_url img_url url"
)

logger = logging.getLogger(__name__)

KNOWN_COLUMNS = {
    "image": tuple(_IMAGE_COLUMNS.split()),
    "caption": ("caption", "captions", "text", "title"),
    "key": ("key", "image_id", "id", "sample_id"),
    "identity": ("identity",),
    "language": LANGUAGE_KEYS,
}
"""Names under which columns are found by default, in any case; the first one that has a value counts."""

URL_SCHEMES = ("http://", "https://")

_NAMES_OF_ROWS = ("id", "sample_id")  # in other tables of a source they may begin again
_SHOWN_NAMES = 20
_SHOWN_CHARACTERS = 40


class Record(NamedTuple):
    """One pair before its image is read."""

    name: str  # where it stands in the source, for the list of failures
    image: bytes | str  # content of the file, or its path or URL
    captions: tuple[CaptionText, ...]  # at least one
    key: str | None  # what marks the same content; None if the source says nothing
    extra: Mapping[str, Any]  # other columns that go into the JSON
    left_out: tuple[CaptionText, ...] = ()  # captions that are neither Chinese nor English
    identity: str | None = None  # what marks the same content in all sources; None if the source says nothing


class Failure(NamedTuple):
    """One record that cannot be packed."""

    name: str  # where it stands in the source
    reason: str  # one word, as in the metrics `data/skipped/<reason>`
    detail: str
    languages: tuple[str, ...] = ()  # of each caption, where all are neither Chinese nor English


class Slice(Protocol):
    """Records of one shard."""

    def __len__(self) -> int:
        """How many records there are at most, failures included."""

    def fingerprint(self) -> str:
        """Equal only for equal records; does not depend on where the source lies."""

    def stamp(self) -> str:
        """Changes when a file that the records name is written again; "" if they name none. Reads no image."""

    def read(self) -> Iterator[Record | Failure]:
        """Read the records; called in a worker."""


class Place(NamedTuple):
    """Where a table lies."""

    root: str = ""  # relative paths of images count from here
    name: str = ""  # of its file, below the folder that all tables of the source share
    folder: str = ""  # in front of relative paths of images, where those of other tables count from elsewhere
    table: str = ""  # in front of ids, where there are other tables


class Columns(NamedTuple):
    """Which columns of a table say what; None looks for `KNOWN_COLUMNS`.

    Attributes:
        image: path, URL or bytes.
        caption: a text, or a list of texts.
        key: what marks the same content in the source.
        identity: what marks the same content in all sources.
        language: of the caption.
        extra: columns that go into the JSON as they are.
        default_language: of captions without a language; None detects it by the script.
    """

    image: str | None = None
    caption: str | None = None
    key: str | None = None
    language: str | None = None
    extra: tuple[str, ...] = ()
    default_language: str | None = None
    identity: str | None = None

    def names(self, role: str) -> tuple[str, ...]:
        """Columns that may have a role, such as "image"."""
        chosen = getattr(self, role)
        return KNOWN_COLUMNS[role] if chosen is None else (chosen,)

    def has_role(self, name: str, role: str) -> bool:
        """Whether a column may have a role."""
        return name == getattr(self, role) if getattr(self, role) is not None else _fold(name) in KNOWN_COLUMNS[role]

    def has_captions(self, name: str) -> bool:
        """Whether a column may have captions; by default also one that `is_caption_column`, such as `text_zh`."""
        return (self.caption is None and is_caption_column(name)) or self.has_role(name, "caption")

    def find(self, row: Mapping[str, Any], role: str) -> Any:
        """The value of a role in a row, or None."""
        name = self.find_name(row, role)
        return None if name is None else row[name]

    def find_name(self, row: Mapping[str, Any], role: str) -> str | None:
        """The column of a role that has a value in a row, or None."""
        chosen = getattr(self, role)
        if chosen is not None:
            return chosen if row.get(chosen) not in (None, "") else None
        by_name = {_fold(name): name for name, value in row.items() if value not in (None, "")}
        return next((by_name[name] for name in KNOWN_COLUMNS[role] if name in by_name), None)

    def reads(self, name: str) -> bool:
        """Whether a column may be read."""
        has_role = any(self.has_role(name, role) for role in ("image", "key", "identity", "language"))
        return has_role or self.has_captions(name) or name in (*self.extra, "caption_roles")

    def check(self, present: Sequence[str], where: str) -> None:
        """Raise a `UserError`, with the columns that are there, if a table lacks images or captions.

        Warns of columns that are not read, once of the same ones.
        """
        for role, is_one in (("image", lambda name: self.has_role(name, "image")), ("caption", self.has_captions)):
            if not any(map(is_one, present)):
                more = ", or call it caption_zh or caption_en" if role == "caption" and self.caption is None else ""
                raise UserError(
                    f"{where}: no column with the {role}: it has {_show_names(present)}, wanted "
                    f"{' or '.join(self.names(role))}; say which it is with columns.{role}=NAME{more}"
                )
        plain = [name for name in present if self.has_role(name, "caption")]
        first = self.find_name(dict.fromkeys(plain, "?"), "caption") or ""
        _warn_of_unread(
            tuple(name for name in present if name and not self.reads(name)),
            tuple(name for name in plain if name != first),
            first,
        )
        missing = [name for name in self.extra if name not in present]
        if missing:
            raise UserError(f"{where}: no column {missing[0]!r} for columns.extra; it has {_show_names(present)}")


@lru_cache(maxsize=64)
def _warn_of_unread(unread: tuple[str, ...], spare: tuple[str, ...], first: str) -> None:
    """Once for tables with the same columns."""
    if unread:
        logger.warning("columns that are not read: %s; columns.extra keeps values", _show_names(unread, 8))
    if spare:
        logger.warning("read only where %s is empty: %s", _show_names([first]), _show_names(spare))


def locate_tables(paths: Sequence[Path], root: str | None) -> Iterator[tuple[Path, Place]]:
    """Tables with their places; relative paths of images count from `root`, by default from the folder of each."""
    shared = os.path.commonpath([os.path.abspath(path.parent) for path in paths]) if paths else ""
    for path in paths:
        name = os.path.relpath(os.path.abspath(path), shared)
        folder = "" if root else os.path.dirname(name)
        yield path, Place(root or str(path.parent), name, folder, name if len(paths) > 1 else "")


def read_row(row: Mapping[str, Any], columns: Columns, name: str, place: Place) -> Record | Failure:
    """A row of a table as a record, or as a failure."""
    said = {name: value for name, value in row.items() if not is_missing(value)}
    try:
        if columns.image is None and any(_fold(column) in _EMBEDDED for column in row):
            said.pop("url", None)  # from where the bytes are; a row without them could not be fetched from there
        image = _image_of(plain_number(columns.find(said, "image")), place.root)
        captions, left_out = _captions_of(said, columns)
        located = image_path(image, place.root) if isinstance(image, str) else image
        extra = {item: row[item] for item in columns.extra if item in row}
        identity = read_identity({"identity": plain_number(columns.find(said, "identity"))})
        return Record(name, located, captions, _key_of(said, columns, image, place), extra, left_out, identity)
    except SampleProblem as problem:
        return fail(name, problem)


def fail(name: str, problem: SampleProblem) -> Failure:
    """The failure of a record, by what is wrong with it."""
    return Failure(name, problem.reason, problem.detail, tuple(caption.language for caption in problem.left_out))


def image_path(image: str, root: str) -> str:
    """Where an image lies: a URL stays, a relative path counts from `root`."""
    return image if image.startswith(URL_SCHEMES) else os.path.join(root, os.path.expanduser(image))


def stamp_images(records: Iterable[Record | Failure]) -> str:
    """A stamp of the local images that records name."""
    images = (record.image for record in records if isinstance(record, Record))
    return stamp_files(image for image in images if isinstance(image, str) and not image.startswith(URL_SCHEMES))


def stamp_files(paths: Iterable[str]) -> str:
    """Hash of the sizes and modification times of files, missing ones included; "" for no files."""
    digest = hashlib.blake2b(digest_size=16)
    is_empty = True
    for path in paths:
        is_empty = False
        digest.update(_describe_file(path))
    return "" if is_empty else digest.hexdigest()


def _show_names(names: Sequence[str], most: int = _SHOWN_NAMES) -> str:
    """Some names, shortened: a table without a header has anything in its first row, a whole image included."""
    shown = [repr(name if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]}…") for name in names]
    more = [f"and {len(names) - most:,} more"] if len(names) > most else []
    return ", ".join([*shown[:most], *more]) or "none"


def _describe_file(path: str) -> bytes:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name with a zero byte in it
        return b"-;"
    return f"{status.st_size},{status.st_mtime_ns};".encode()


def _image_of(value: Any, root: str) -> bytes | str:
    if isinstance(value, Mapping):  # as Hugging Face stores images
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise SampleProblem("missing_image", "no path, URL or bytes")
    if isinstance(value, str) and value.isdecimal():
        return find_numbered(value, root) or value
    if isinstance(value, int) and not isinstance(value, bool):
        if (found := find_numbered(str(value), root)) is None:
            raise SampleProblem("missing_image", f"no image is called {value}.jpg, or so, where the table's images are")
        return found
    if not isinstance(value, bytes | str):
        raise SampleProblem("wrong_type", f"the image is a {type(value).__name__}, not a path, a URL or bytes")
    return value


def _captions_of(row: Mapping[str, Any], columns: Columns) -> Captions:
    language = _language_of(row, columns)
    items: list[tuple[object, str | None, object]] = []
    value = columns.find(row, "caption")
    if value is not None:
        items.append((open_text(value), language, row.get("caption_roles")))
    if columns.caption is None:
        items += captions_by_column(row, language)
    found = gather(items, "the caption")
    if not found.kept:
        names = columns.names("caption") if columns.caption else (*columns.names("caption"), "caption_zh", "caption_en")
        detail = describe_missing(found.left_out) or f"nothing in {', '.join(names)}"
        raise SampleProblem("missing_caption", detail, found.left_out)
    return found


def _key_of(row: Mapping[str, Any], columns: Columns, image: bytes | str, place: Place) -> str | None:
    """What marks the content of a row in its source. The same file in two rows is the same picture, without a key."""
    column = columns.find_name(row, "key")
    if column is not None:
        key = read_identity({"key": plain_number(row[column])})
        is_id = columns.key is None and _fold(column) in _NAMES_OF_ROWS
        return f"{place.table}: {key}" if place.table and is_id else key
    if not isinstance(image, str):
        return None
    return read_identity({"key": image if image.startswith(URL_SCHEMES) else os.path.join(place.folder, image)})


def _language_of(row: Mapping[str, Any], columns: Columns) -> str | None:
    value = columns.find(row, "language")
    named = None if value is None else read_language(value)
    if named is None and columns.caption is not None:
        named = language_of_column(columns.caption)
    return named or columns.default_language


def _fold(name: str) -> str:
    return name.strip().lower()
