"""jieba's dictionary, and files of more words for it.

Such a file is read here and not by jieba, which accepts any line: it takes `笑脸 -5 n` for the word `笑脸 -5`, and a
file with the line ends of an old Mac for one word. Valid files are read as jieba reads them.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from m2_encoder.errors import UserError

DICTIONARY_FIX = "give a UTF-8 file with `word [frequency] [tag]` a line"

_LINE = re.compile(r"(.+?)(?: ([0-9]+))?(?: ([a-z]+))?")
_OTHER_SPACE = re.compile(r"[^\S ]|  ")
_LIKE_A_NUMBER = re.compile(r" \W?\d")
_MOST_DIGITS = 15  # of a frequency: jieba's own add up to 60 million, and a float holds these exactly


class UserWord(NamedTuple):
    """A word of a user's dictionary."""

    text: str  # may hold single spaces
    frequency: int | None  # beside jieba's; None for one that lets it be found, 0 for a word taken away


def read_user_words(path: str | os.PathLike[str]) -> list[UserWord]:
    """The words of a file in jieba's format, `word [frequency] [tag]` a line; does not need jieba.

    Byte order marks, blank lines, and words with single spaces and a frequency are allowed.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no such dictionary; the message names the line, what is wrong and what to write.
    """
    words = []
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{os.fspath(path)} is no regular file (a folder, a pipe or a device)")
    for number, content in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        try:
            line = content.decode("utf-8").lstrip("\ufeff").strip(" \t\r\v\f")
        except UnicodeDecodeError:
            raise ValueError(f"line {number}: is not UTF-8; {DICTIONARY_FIX}") from None
        if not line:
            continue
        if fault := _find_fault(line):
            raise ValueError(f"line {number}: {line!r:.80} {fault}")
        word, frequency, _ = _match(line)
        words.append(UserWord(word, None if frequency is None else int(frequency)))
    if not words:
        raise ValueError(f"holds no words; {DICTIONARY_FIX}")
    return words


def load_jieba(words: Iterable[UserWord] = ()) -> Any:
    """A jieba tokenizer without its cache file, which lies in a folder that everybody may write; takes a second.

    It holds the dictionary alone; `HanWords` applies jieba's model.

    Raises:
        UserError: if jieba is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of jieba 0.42 itself: old escapes, an old way to find its files
            import jieba
    except ImportError as error:
        raise UserError("Chinese words are found by jieba, which is not installed; pip install jieba") from error
    jieba.setLogLevel(logging.WARNING)
    segmenter = jieba.Tokenizer()
    segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
    segmenter.initialized = True
    for word, frequency in words:
        if frequency == 0:
            # jieba's own way would keep the word apart in every other tokenizer of the process, too.
            segmenter.FREQ[word] = 0
        else:
            segmenter.add_word(word, frequency)
    return segmenter


def _match(line: str) -> tuple[str, str | None, str | None]:
    """Word, frequency and tag of a line, as jieba tells them apart."""
    match = _LINE.fullmatch(line)
    assert match is not None, "holds at least one character"
    word, frequency, tag = match.groups()
    return word, frequency, tag


def _find_fault(line: str) -> str:
    """What is wrong with a line and what to write; empty if nothing is."""
    if space := _OTHER_SPACE.search(line):
        found = "two spaces in a row" if space[0] == "  " else f"white space U+{ord(space[0]):04X}"
        return f"holds {found}; write `word [frequency] [tag]` with single spaces"
    word, frequency, tag = _match(line)
    if frequency is not None and len(frequency) > _MOST_DIGITS:
        return f"has a frequency of {len(frequency)} digits; give at most {_MOST_DIGITS}"
    if frequency is None and " " in word and (tag is not None or _LIKE_A_NUMBER.search(word)):
        # Nobody can tell whether this is a word of several parts, or a frequency or tag that is none.
        rule = "a whole number from 0, after the word, and a tag of small letters behind it or none"
        return f"would be the word {word!r:.60}, without a frequency; write {rule}"
    return ""
