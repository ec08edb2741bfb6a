"""Parses the text files of a sample.

Its captions are the first of these that has any:

- `.json` with `captions`: {language: [text or {"text": …, "role": …}, …]}; the roles may also be in
  `caption_roles`: {language: [role, …]}. One text may stand for a list of it, and a list for texts whose languages
  are not said,
- `.json` with `caption` or `text`, of the same forms, and with keys that name a language, such as `caption_zh`,
- `.txt`: one caption a line.

Languages are read by `read_language`. A caption without one has that of the sample (`language` or `lang` in its JSON),
or else of the source, or is told apart by its script. Captions that are neither Chinese nor English are left out.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

from m2_encoder.data.images.suffixes import PICTURE_SUFFIXES
from m2_encoder.data.samples.language import describe_languages, detect_language, language_of_column, read_language
from m2_encoder.errors import UserError
from m2_encoder.tokenizers.spaces import normalise_spaces
from m2_encoder.types import LANGUAGES

_TEXT_KEYS = {"text", "caption"}  # of an entry that is a caption with its role or language

_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

PLAIN_CAPTION_KEYS = ("caption", "text")
"""Keys of a JSON, in any case, that hold captions without their languages."""

LANGUAGE_KEYS = (
    "language", "lang", "caption_language", "caption_lang", "text_language", "text_lang", "language_code", "lang_code",
    "语言", "语种",
)  # fmt: skip
"""Keys of a JSON, in any case, that say the language of those captions."""

UNDECLARED = "?"
"""Given as the language of captions that do not name one, it stays theirs: the caller finds out later."""

_KEPT = (*LANGUAGES, UNDECLARED)
_PYTHON_LIST = re.compile(r"\s*[\[{]\s*'.*'\s*[\]}]\s*", re.DOTALL)
_NUMBERED = re.compile(r"(?:captions?|texts?|sentences?)[ _.-]?\d{1,3}", re.IGNORECASE)
_MOST_DIGITS = 20  # of a number that a name may be
_SHOWN = 10  # keys of a JSON in a message


class CaptionText(NamedTuple):
    """A stored caption."""

    text: str  # without blanks around it, never empty
    language: str  # one of `LANGUAGES`; of one that is left out, what it is instead
    role: str | None  # what kind of caption, such as "name" or "rewritten"; None if unknown


class SampleProblem(UserError):
    """An unusable sample: the reason in one word, as in the metrics `data/skipped/<reason>`, and the detail.

    `left_out` are its captions that are neither Chinese nor English, where it has no others.
    """

    def __init__(self, reason: str, detail: str, left_out: tuple[CaptionText, ...] = ()) -> None:
        self.reason = reason
        self.detail = " ".join(detail.split())
        self.left_out = left_out
        super().__init__(f"{reason}: {self.detail}")

    def __reduce__(self) -> tuple[type[SampleProblem], tuple[str, str, tuple[CaptionText, ...]]]:
        return type(self), (self.reason, self.detail, self.left_out)


class Captions(NamedTuple):
    """Captions that were read."""

    kept: tuple[CaptionText, ...]  # by language in the order of `LANGUAGES`
    left_out: tuple[CaptionText, ...] = ()  # those in other languages


class SampleText(NamedTuple):
    """Captions and metadata of a sample."""

    captions: tuple[CaptionText, ...]  # at least one, by language in the order of `LANGUAGES`
    identity: str | None  # equal ones mark the same content; None if it has none
    is_marked: bool  # whether that is its `identity`, which somebody meant, and not only its `key`
    metadata: Mapping[str, Any]  # the JSON; empty without one
    left_out: tuple[CaptionText, ...] = ()  # captions that are neither Chinese nor English


def parse_sample_text(json_file: bytes | None, text_file: bytes | None, *, language: str | None = None) -> SampleText:
    """Parse the `.json` and `.txt` of a sample; `language` is that of captions that do not name one.

    With `UNDECLARED` as the language, captions may have that one.

    Raises:
        SampleProblem: missing_caption, bad_json, not_utf8, wrong_type or empty_member.
    """
    metadata = {} if json_file is None else parse_json_object(json_file)
    kept, left_out = read_captions(metadata, language=language)
    if not kept and text_file:
        opened = open_text(decode_text(text_file, "its .txt"))
        # Each line is a caption of the picture, as in the data sets of CLIP_benchmark.
        lines = re.split("\r\n|\r|\n", opened) if isinstance(opened, str) else opened
        kept, others = gather([(lines, _language_in(metadata) or language, None)], "its .txt")
        left_out = tuple(dict.fromkeys((*left_out, *others)))
    if not kept and json_file is None and text_file is not None and not text_file:
        raise SampleProblem("empty_member", "its .txt has no bytes")
    if not kept:
        detail = describe_missing(left_out) or _describe_nothing(metadata, json_file, text_file)
        raise SampleProblem("missing_caption", detail, left_out)
    is_marked = metadata.get("identity") is not None
    return SampleText(kept, read_identity(metadata), is_marked, metadata, left_out)


def name_content(text: SampleText, *, key: str, shard: str, source: str) -> str:
    """Name of what a sample shows: equal names mark the same content.

    An `identity` is valid in all sources, a `key` in its own one. A `key` that repeats the name of the sample's files
    says no more than that name, which most tools count up from 0 in every shard: such a sample is unique.
    """
    if text.identity is not None and text.is_marked:
        return text.identity
    if text.identity is None or repeats_name(text.metadata.get("key", text.identity), key):
        return "\0".join((source, shard, key))
    return "\0".join((source, str(text.identity)))


def repeats_name(mark: object, name: str) -> bool:
    """Whether a mark is no more than the name of the sample's files, with or without folders and a picture's suffix.

    A number says no more than the same number with zeros before it.

    >>> [repeats_name(mark, "b/007") for mark in ("007", "007.jpg", "b/007", 7, "a/007", "7", 8)]
    [True, True, True, True, False, False, False]
    """
    name = name.removeprefix("./")
    file = name.rpartition("/")[2]
    if isinstance(mark, int | float):
        return file.isdecimal() and len(file) <= _MOST_DIGITS and int(file) == mark
    stem, suffix = os.path.splitext(str(mark))
    return (stem if suffix.lower() in PICTURE_SUFFIXES else str(mark)).removeprefix("./") in (name, file)


def _describe_nothing(metadata: Mapping[str, Any], json_file: bytes | None, text_file: bytes | None) -> str:
    if text_file is not None:
        return "its .txt is blank"
    if json_file is None:
        return "no .json or .txt; wanted captions, caption or text in a .json, or a .txt"
    keys = [name[:40] for name in metadata]
    more = [f"{len(keys) - _SHOWN:,} more"] if len(keys) > _SHOWN else []
    where = f"its JSON has {', '.join([*keys[:_SHOWN], *more]) or 'no keys'}"
    nulls = [key for key in ("captions", *PLAIN_CAPTION_KEYS) if key in metadata]
    if nulls:
        return f"{where}, but no text in {', '.join(nulls)}"
    return f"{where}; wanted captions, caption or text in a .json, or a .txt"


def parse_json_object(content: bytes) -> dict[str, Any]:
    """Parse a `.json` that must hold an object.

    Raises:
        SampleProblem: empty_member, not_utf8 or bad_json.
    """
    if not content:
        raise SampleProblem("empty_member", "its .json has no bytes")
    text = decode_text(content, "its JSON")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SampleProblem("bad_json", str(error) or type(error).__name__) from error
    if not isinstance(value, dict):
        raise SampleProblem("bad_json", f"holds a {type(value).__name__}, not an object")
    return value


def decode_text(content: bytes, what: str) -> str:
    """UTF-8 as text, without a byte order mark; with one of UTF-16, as Windows saves "Unicode", that.

    Raises:
        SampleProblem: not_utf8.
    """
    try:
        return content.decode("utf-16" if content.startswith(_UTF16_MARKS) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleProblem(
            "not_utf8", f"{what} is not UTF-8 at byte {error.start}; convert it, as with iconv -f gb18030 -t utf-8"
        ) from error


def read_captions(metadata: Mapping[str, Any], *, language: str | None = None) -> Captions:
    """Captions in a sample's JSON without blank ones; `language` is that of captions that do not name one.

    Raises:
        SampleProblem: wrong_type for captions of another form, not_utf8 for characters that UTF-8 cannot hold.
    """
    language = _language_in(metadata) or language
    folded = {key.lower(): value for key, value in reversed(list(metadata.items()))}
    found = Captions(())
    if folded.get("captions") is not None:
        found = gather([(open_text(folded["captions"]), language, folded.get("caption_roles"))], "captions")
    if found.kept:
        return found
    plain = (folded[name] for name in PLAIN_CAPTION_KEYS if not _is_blank(folded.get(name)))
    items = [(open_text(value), language, None) for value in islice(plain, 1)]
    others = gather([*items, *captions_by_column(metadata, language)], "caption")
    return Captions(others.kept, (*found.left_out, *others.left_out))


def captions_by_column(
    row: Mapping[str, Any], language: str | None = None
) -> Iterator[tuple[object, str | None, object]]:
    """What `gather` takes, of columns or keys that hold captions by their names, see `is_caption_column`.

    Numbers, lengths and scores of captions, are no captions. `language` is that of captions that do not name one.
    """
    for name, value in row.items():
        if is_caption_column(name) and _is_text(value):
            yield open_text(value), language_of_column(name) or language, None


@lru_cache(maxsize=4096)
def is_caption_column(name: str) -> bool:
    """Whether the name of a column or key says a language, as `caption_zh`, `text_en`, `zh`, or a number: `caption_1`.

    >>> [is_caption_column(name) for name in ("caption_zh", "en", "caption_1", "text2", "caption", "caption_id")]
    [True, True, True, True, False, False]
    """
    return language_of_column(name) is not None or _NUMBERED.fullmatch(name.strip()) is not None


def open_text(value: Any) -> Any:
    """A value that may hold captions; the text of a JSON list or object of them is read as that.

    Raises:
        SampleProblem: wrong_type for such a text in Python's own form.
    """
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    try:
        opened = json.loads(value)
    except (ValueError, RecursionError):
        if _PYTHON_LIST.fullmatch(value):
            rule = 'is a list of Python; write it as JSON, such as ["a cat", "a pet"]'
            raise SampleProblem("wrong_type", f"the caption {value[:40]!r} {rule}") from None
        return value
    if isinstance(opened, Mapping):
        is_meant = any(map(language_of_column, opened)) or bool(_TEXT_KEYS & opened.keys())
    else:
        is_meant = bool(opened) and isinstance(opened, list) and all(isinstance(item, str | Mapping) for item in opened)
    return opened if is_meant else value


def gather(items: Iterable[tuple[object, str | None, object]], where: str) -> Captions:
    """Captions of any of the known forms, each with the language of those that do not name one, and roles.

    A caption of an item that an earlier item has, too, in the same language, is read once.

    Raises:
        SampleProblem: wrong_type for captions of another form, not_utf8 for characters that UTF-8 cannot hold.
    """
    found: dict[CaptionText, None] = {}
    captions: list[CaptionText] = []
    for value, language, roles in items:
        own = list(_read(value, language, roles, where))
        captions += [caption for caption in own if caption not in found]
        found |= dict.fromkeys(own)
    kept = tuple(caption for name in _KEPT for caption in captions if caption.language == name)
    return Captions(kept, tuple(caption for caption in captions if caption.language not in _KEPT))


def read_identity(metadata: Mapping[str, Any]) -> str | None:
    """`identity`, or else `key`, as text: equal ones mark equal content.

    Raises:
        SampleProblem: not_utf8 or wrong_type.
    """
    for key in ("identity", "key"):
        value = metadata.get(key)
        if isinstance(value, float) and value.is_integer():  # what pandas makes of a whole number
            value = int(value)
        if value is not None and value != "nan" and value == value:  # NaN marks nothing
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise SampleProblem("wrong_type", f"{key} is a {type(value).__name__}, not a text or whole number")
            return _encodable(str(value))
    return None


def describe_missing(left_out: Iterable[CaptionText]) -> str:
    """Why a sample whose captions are all in other languages has none; "" without any."""
    counts = Counter(caption.language for caption in left_out)
    if not counts:
        return ""
    return f"it has {describe_languages(counts)}; wanted a text in one of {', '.join(LANGUAGES)}"


def _read(value: object, language: str | None, roles: object, where: str) -> Iterator[CaptionText]:
    """Captions of a value: a text, an entry, a list of those, or any of these by language."""
    if not isinstance(value, Mapping) or _TEXT_KEYS & value.keys():
        yield from _read_list(value, language, roles, where)
        return
    for name, items in value.items():
        own = roles.get(name) if isinstance(roles, Mapping) else None
        named = read_language(name)
        if named in (None, *LANGUAGES):
            yield from _read_list(items, named or language, own, f"{where} of {name!r:.40}")
        else:
            texts = map(_text_of, items if isinstance(items, list | tuple) else [items])
            sound = (text.encode("utf-8", "replace").decode().strip() for text in texts if text)
            yield from (CaptionText(text, str(named), None) for text in sound if text)


def _read_list(items: object, language: str | None, roles: object, where: str) -> Iterator[CaptionText]:
    if items is None:
        return
    if isinstance(items, str | Mapping):
        items, roles = [items], None if roles is None else [roles] if isinstance(roles, str) else roles
    if not isinstance(items, list | tuple):
        raise SampleProblem("wrong_type", f"{where} is a {type(items).__name__}, not a text or a list of texts")
    beside = roles if isinstance(roles, list | tuple) else [None] * len(items)
    if len(beside) != len(items):
        raise SampleProblem("wrong_type", f"{len(items)} captions and {len(beside)} caption_roles: {where}")
    for item, role in zip(items, beside, strict=True):
        if item is None:
            continue
        named = language
        if isinstance(item, Mapping):
            role = item.get("role")
            named = _language_in(item) or language
        text = _text_of(item)
        if text is None or not (role is None or isinstance(role, str)):
            raise SampleProblem("wrong_type", f"{where}: {str(item)[:60]!r} is not a text")
        if normalise_spaces(clean := _encodable(text).strip()):
            yield CaptionText(clean, named or detect_language(clean), role)


def _text_of(item: object) -> str | None:
    if isinstance(item, Mapping):
        item = next((item[key] for key in ("text", "caption") if key in item), None)
    return item if isinstance(item, str) else None


def _language_in(metadata: Mapping[str, Any]) -> str | None:
    """The language that `language` or `lang` says; None where it is not said."""
    for key, value in metadata.items():
        if isinstance(value, str) and key.lower() in LANGUAGE_KEYS:
            return read_language(value)
    return None


def _is_blank(value: object) -> bool:
    return not value or (isinstance(value, str) and not value.strip())


def _is_text(value: object) -> bool:
    if not isinstance(value, str):
        return isinstance(value, list | tuple) and bool(value) and all(map(_is_text, value))
    try:
        float(value)
    except ValueError:
        return value.strip().lower() not in ("", "true", "false", "yes", "no")
    return False


def _encodable(text: str) -> str:
    """The text itself; refuses half a surrogate pair, which JSON can contain and no tokenizer reads."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SampleProblem("not_utf8", f"holds U+{ord(text[error.start]):04X}, half a character") from error
    return text
