"""Records of any kind of source, and the slices of records that become one shard each.

The main process cuts a source into slices of paths, offsets or names; workers read, check and write the records.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from m2_encoder.data.packing.values import find_numbered, is_missing, plain_number
from m2_encoder.data.samples.language import detect_language
from m2_encoder.data.samples.parse import CaptionText, SampleProblem, read_captions, read_identity
from m2_encoder.errors import UserError
from m2_encoder.types import LANGUAGES

_IMAGE_COLUMNS = "image image_path img_path filepath file_name filename file path image_url url URL"

KNOWN_COLUMNS = {
    "image": tuple(_IMAGE_COLUMNS.split()),
    "caption": ("caption", "captions", "text", "TEXT", "title"),
    "key": ("key", "id", "image_id", "sample_id"),
    "language": ("language", "lang"),
}
"""Names under which columns are found by default; the first one that has a value counts."""

URL_SCHEMES = ("http://", "https://")

_SHOWN_NAMES = 20
_SHOWN_CHARACTERS = 40


class Record(NamedTuple):
    """One pair before its image is read."""

    name: str  # where it stands in the source, for the list of failures
    image: bytes | str  # content of the file, or its path or URL
    captions: tuple[CaptionText, ...]  # at least one
    key: str | None  # what marks the same content; None if the source says nothing
    extra: Mapping[str, Any]  # other columns that go into the JSON


class Failure(NamedTuple):
    """One record that cannot be packed."""

    name: str  # where it stands in the source
    reason: str  # one word, as in the metrics `data/skipped/<reason>`
    detail: str


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


class Columns(NamedTuple):
    """Which columns of a table say what; None looks for `KNOWN_COLUMNS`.

    Attributes:
        image: path, URL or bytes.
        caption: a text, or a list of texts.
        key: what marks the same content.
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

    def names(self, role: str) -> tuple[str, ...]:
        """Columns that may have a role, such as "image"."""
        chosen = getattr(self, role)
        return KNOWN_COLUMNS[role] if chosen is None else (chosen,)

    def caption_names(self) -> tuple[str, ...]:
        """Columns that may have captions, those of one language included."""
        by_language = [f"{name}_{language}" for name in ("caption", "text") for language in LANGUAGES]
        return (*self.names("caption"), *(by_language if self.caption is None else ()))

    def find(self, row: Mapping[str, Any], role: str) -> Any:
        """The value of a role in a row, or None."""
        return next((row[name] for name in self.names(role) if not is_missing(row.get(name))), None)

    def check(self, present: Sequence[str], where: str) -> None:
        """Raise a `UserError`, with the columns that are there, if a table lacks images or captions."""
        for role, names in (("image", self.names("image")), ("caption", self.caption_names())):
            if not set(names) & set(present):
                raise UserError(
                    f"{where}: no column with the {role}: it has {_show_names(present)}, wanted "
                    f"{' or '.join(names)}; say which it is with columns.{role}=NAME"
                )
        missing = [name for name in self.extra if name not in present]
        if missing:
            raise UserError(f"{where}: no column {missing[0]!r} for columns.extra; it has {_show_names(present)}")


def read_row(row: Mapping[str, Any], columns: Columns, name: str, root: str) -> Record | Failure:
    """A row of a table as a record, or as a failure; relative paths of images count from `root`."""
    try:
        image = _image_of(plain_number(columns.find(row, "image")), root)
        captions = _captions_of(row, columns)
        key = plain_number(columns.find(row, "key"))
        # The same file in two rows is the same picture, also where nobody gives it a key.
        identity = read_identity({"key": image if key is None and isinstance(image, str) else key})
        located = image_path(image, root) if isinstance(image, str) else image
        return Record(name, located, captions, identity, {item: row[item] for item in columns.extra if item in row})
    except SampleProblem as problem:
        return Failure(name, problem.reason, problem.detail)


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


def _show_names(names: Sequence[str]) -> str:
    """Some names, shortened: a table without a header has anything in its first row, a whole image included."""
    shown = [repr(name if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]}…") for name in names]
    more = [f"and {len(names) - _SHOWN_NAMES:,} more"] if len(names) > _SHOWN_NAMES else []
    return ", ".join([*shown[:_SHOWN_NAMES], *more]) or "none"


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


def _captions_of(row: Mapping[str, Any], columns: Columns) -> tuple[CaptionText, ...]:
    language = _language_of(columns.find(row, "language")) or columns.default_language
    found: list[CaptionText] = []
    value = columns.find(row, "caption")
    if isinstance(value, Mapping):
        found += read_captions({"captions": value, "caption_roles": row.get("caption_roles")})
    else:
        texts = value if isinstance(value, list | tuple) else [] if value is None else [value]
        for text in texts:
            if not isinstance(text, str):
                raise SampleProblem("wrong_type", f"the caption is a {type(text).__name__}, not a text")
            found += read_captions({"captions": {language or detect_language(text): [text]}})
    if columns.caption is None:
        for tag in LANGUAGES:
            for name in (f"caption_{tag}", f"text_{tag}"):
                found += read_captions({"captions": {tag: [row[name]]}}) if row.get(name) else ()
    if not found:
        raise SampleProblem("missing_caption", f"nothing in {', '.join(columns.caption_names())}")
    return tuple(found)


def _language_of(value: Any) -> str | None:
    if value is None:
        return None
    language = str(value).lower().replace("_", "-").partition("-")[0]
    if language not in LANGUAGES:
        raise SampleProblem("missing_caption", f"its language {str(value)[:20]!r} is none of {', '.join(LANGUAGES)}")
    return language
