"""Words of captions in both languages; Chinese ones are cut by jieba, whose dictionary takes a second to load."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import pairwise

from m2_encoder.tokenizers.han_words import HAN, HanWords

_WORD = re.compile(r"\w+(?:['’\-]\w+)*")
_HAS_WORD_CHARACTER = re.compile(r"[^\W_]")
# What jieba looks at together; it leaves every other character alone.
_BLOCK = re.compile(f"[{HAN}a-zA-Z0-9+#&._%\\-]+|[^\\W_]")


def split_words(text: str, language: str) -> list[str]:
    """Words of a text in order, without spaces and punctuation.

    "zh" is cut as by jieba, which leaves English words in it whole; any other language at what is no letter, digit, or
    an apostrophe or hyphen inside a word.

    Source: jieba 0.42, accurate mode with its hidden Markov model for unknown words.
    """
    if language != "zh":
        return _WORD.findall(text)
    words: list[str] = []
    for block in _BLOCK.findall(text):
        words += [block[start:end] for start, end in pairwise((*_cutter()(block), len(block)))]
    return [word for word in words if _HAS_WORD_CHARACTER.search(word)]


def count_words(text: str, language: str) -> int:
    """How many words `split_words` finds."""
    return len(split_words(text, language))


@lru_cache(maxsize=1)
def _cutter() -> HanWords:
    return HanWords()
