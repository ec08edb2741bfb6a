"""White space and characters that nobody sees, as a tokenizer gets them."""

from __future__ import annotations

import re

# Signs of control, soft hyphens, zero-width characters, marks of direction, fillers, variants of ideographs.
_INVISIBLE = (
    "\\x00-\\x08\\x0e-\\x1b\\x7f-\\x84\\x86-\\x9f\\u00ad\\u034f\\u061c\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180f\\u200b\\u200c"
    "\\u200e\\u200f\\u202a-\\u202e\\u2060-\\u206f\\u3164\\ufeff\\uffa0\\ufff9-\\ufffb\\U000e0001\\U000e0100-\\U000e01ef"
)
_SPACE = r"\s\u0085"
_PICTURE = "\\u00a9\\u00ae\\u203c-\\u2bff\\u3030\\u303d\\u3297\\u3299\\ufe0f\\U0001f000-\\U0001faff"
# A zero-width joiner makes one picture of two, as in 👩‍🚀; anywhere else it joins nothing that can be seen.
_LONE_JOINER = f"(?<![{_PICTURE}])\\u200d|\\u200d(?![{_PICTURE}])"
_DROPPED = f"[{_INVISIBLE}]+|{_LONE_JOINER}"
# Chinese characters and their punctuation, which are written without spaces.
_HAN = (
    "\\u3001-\\u301f\\u3400-\\u4dbf\\u4e00-\\u9fff\\uf900-\\ufaff\\uff01-\\uff0f\\uff1a-\\uff20\\uff3b-\\uff40\\uff5b-\\uff65"
    "\\U00020000-\\U000323af"
)
_BETWEEN_HAN = f"(?<=[{_HAN}]) (?=[{_HAN}])"
_BLANKS = f"[{_SPACE}]+"
_drop, _join_blanks, _close_han = (re.compile(pattern) for pattern in (_DROPPED, _BLANKS, _BETWEEN_HAN))


def normalise_spaces(text: str) -> str:
    r"""One space for every run of white space, and no characters that nobody sees; joiners inside emoji stay.

    Around the text and between Chinese characters there is no space, as in BERT's tokenizers.

    >>> normalise_spaces(" a\u00a0 red\u200b\tcat\n")
    'a red cat'
    """
    if text.isascii() and text.isprintable() and "  " not in text:
        return text.strip(" ")
    text = _join_blanks.sub(" ", _drop.sub("", text)).strip(" ")
    return _close_han.sub("", text) if " " in text else text


def space_rules() -> list[tuple[str, str]]:
    """`normalise_spaces` as (regular expression, replacement), one after the other, for engines other than Python's.

    Characters stand for themselves, since engines write escapes in different ways.
    """
    rules = [(_DROPPED, ""), (_BLANKS, " "), ("^ | $", ""), (_BETWEEN_HAN, "")]
    return [(_write_out(pattern), replacement) for pattern, replacement in rules]


def _write_out(pattern: str) -> str:
    pattern = pattern.replace(r"\s", r"\s\x1c-\x1f")  # of other engines, it lacks these
    return re.sub(r"\\(?:x(..)|u(.{4})|U(.{8}))", lambda code: chr(int(code[1] or code[2] or code[3], 16)), pattern)
