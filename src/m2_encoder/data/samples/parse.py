"""Parses the text files of a sample.

Its captions are the first of these that is there:

- `.json` with `captions`: {language: [text or {"text": …, "role": …}, …]}; the roles may also be in
  `caption_roles`: {language: [role, …]},
- `.json` with `caption` or `text`: one string,
- `.txt`: one caption.

Without a language there, it is the source's, or detected by the script.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from m2_encoder.data.samples.language import detect_language
from m2_encoder.errors import UserError
from m2_encoder.types import LANGUAGES

PLAIN_CAPTION_KEYS = ("caption", "text")
"""Keys of a JSON that hold one caption as a string."""


class SampleProblem(UserError):
    """An unusable sample: the reason in one word, as in the metrics `data/skipped/<reason>`, and the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = " ".join(detail.split())
        super().__init__(f"{reason}: {self.detail}")

    def __reduce__(self) -> tuple[type[SampleProblem], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


class CaptionText(NamedTuple):
    """A stored caption."""

    text: str  # without blanks around it, never empty
    language: str  # one of `LANGUAGES`
    role: str | None  # what kind of caption, such as "name" or "rewritten"; None if unknown


class SampleText(NamedTuple):
    """Captions and metadata of a sample."""

    captions: tuple[CaptionText, ...]  # at least one, by language in the order of `LANGUAGES`
    identity: str | None  # equal ones mark the same content; None if it has none
    is_marked: bool  # whether that is its `identity`, which somebody meant, and not only its `key`
    metadata: Mapping[str, Any]  # the JSON; empty without one


def parse_sample_text(json_file: bytes | None, text_file: bytes | None, *, language: str | None = None) -> SampleText:
    """Parse the `.json` and `.txt` of a sample; `language` is that of captions that do not name one.

    Raises:
        SampleProblem: missing_caption, bad_json, not_utf8, wrong_type or empty_member.
    """
    metadata = {} if json_file is None else parse_json_object(json_file)
    captions = read_captions(metadata, language=language)
    if not captions and text_file is not None:
        if not text_file:
            raise SampleProblem("empty_member", "its .txt has no bytes")
        captions = _tag([decode_text(text_file, "its .txt")], language)
    if not captions:
        raise SampleProblem("missing_caption", _describe_nothing(metadata, json_file, text_file))
    is_marked = metadata.get("identity") is not None
    return SampleText(captions, read_identity(metadata), is_marked, metadata)


def name_content(text: SampleText, *, key: str, shard: str, source: str) -> str:
    """Name of what a sample shows: equal names mark the same content.

    An `identity` is valid in all sources, a `key` in its own one. A `key` that equals the name of the sample's files is
    no more than that name, which most tools count up from 0 in every shard: such a sample is unique.
    """
    if text.identity is not None and text.is_marked:
        return text.identity
    if text.identity in (None, key, key.rpartition("/")[2]):
        return "\0".join((source, shard, key))
    return "\0".join((source, str(text.identity)))


def _describe_nothing(metadata: Mapping[str, Any], json_file: bytes | None, text_file: bytes | None) -> str:
    by_language = metadata.get("captions")
    if isinstance(by_language, Mapping):
        found = ", ".join(map(str, by_language)) or "no language"
        return f"its captions are of {found}; wanted a text in one of {', '.join(LANGUAGES)}"
    if text_file is not None:
        return "its .txt is blank"
    where = "no .json or .txt" if json_file is None else f"its JSON has {', '.join(metadata) or 'no keys'}"
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
    """UTF-8 as text, without a byte order mark.

    Raises:
        SampleProblem: not_utf8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleProblem("not_utf8", f"{what} is not UTF-8 at byte {error.start}") from error


def read_captions(metadata: Mapping[str, Any], *, language: str | None = None) -> tuple[CaptionText, ...]:
    """Captions in a sample's JSON without blank ones; `language` is that of captions that do not name one.

    Raises:
        SampleProblem: wrong_type for captions of another form, not_utf8 for characters that UTF-8 cannot hold.
    """
    by_language = metadata.get("captions")
    if by_language is not None:
        if not isinstance(by_language, Mapping):
            raise SampleProblem("wrong_type", f"captions is a {type(by_language).__name__}, not lists by language")
        all_roles = metadata.get("caption_roles")
        roles = all_roles if isinstance(all_roles, Mapping) else {}
        found = (_read_list(by_language[name], roles.get(name), name) for name in LANGUAGES if name in by_language)
        return tuple(item for items in found for item in items)
    for key in PLAIN_CAPTION_KEYS:
        if metadata.get(key) is not None:
            if not isinstance(metadata[key], str):
                raise SampleProblem("wrong_type", f"{key} is a {type(metadata[key]).__name__}, not a text")
            return _tag([metadata[key]], language)
    return ()


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


def _read_list(items: object, roles: object, language: str) -> tuple[CaptionText, ...]:
    if not isinstance(items, list | tuple):
        raise SampleProblem("wrong_type", f"captions of {language!r} are a {type(items).__name__}, not a list")
    beside = roles if isinstance(roles, list | tuple) else [None] * len(items)
    if len(beside) != len(items):
        raise SampleProblem("wrong_type", f"{len(items)} captions and {len(beside)} caption_roles of {language!r}")
    found = []
    for item, role in zip(items, beside, strict=True):
        text, role = (item.get("text"), item.get("role")) if isinstance(item, Mapping) else (item, role)
        if not isinstance(text, str) or not (role is None or isinstance(role, str)):
            raise SampleProblem("wrong_type", f"a caption of {language!r} is {str(item)[:60]!r}, not a text")
        found += [CaptionText(clean, language, role)] if (clean := _encodable(text).strip()) else []
    return tuple(found)


def _tag(texts: list[str], language: str | None) -> tuple[CaptionText, ...]:
    cleaned = (_encodable(text).strip() for text in texts)
    return tuple(CaptionText(text, language or detect_language(text), None) for text in cleaned if text)


def _encodable(text: str) -> str:
    """The text itself; refuses half a surrogate pair, which JSON can contain and no tokenizer reads."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SampleProblem("not_utf8", f"holds U+{ord(text[error.start]):04X}, half a character") from error
    return text
