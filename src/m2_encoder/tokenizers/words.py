"""Words of captions in both languages: Chinese has no spaces, so jieba finds them.

jieba takes about a second to read its dictionary, at the first Chinese text.
"""

from __future__ import annotations

import logging
import re
import warnings
from functools import lru_cache
from typing import Any

_WORD = re.compile(r"\w+(?:['’\-]\w+)*")
_HAS_WORD_CHARACTER = re.compile(r"[^\W_]")


def split_words(text: str, language: str) -> list[str]:
    """Words of a text in order, without spaces and punctuation.

    Args:
        text: a caption.
        language: "zh" is cut by jieba, which leaves English words in it whole; any other at what is no letter,
            digit, or an apostrophe or hyphen inside a word.

    Source: jieba 0.42, accurate mode with its hidden Markov model for unknown words.
    """
    if language != "zh":
        return _WORD.findall(text)
    return [word for word in _segmenter().lcut(text) if _HAS_WORD_CHARACTER.search(word)]


def count_words(text: str, language: str) -> int:
    """How many words `split_words` finds."""
    return len(split_words(text, language))


@lru_cache(maxsize=1)
def _segmenter() -> Any:
    """A segmenter of our own: jieba's shared one keeps its dictionary as a file in a folder open to everybody."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of jieba 0.42 itself: old escapes, an old way to find its files
        import jieba
    jieba.setLogLevel(logging.WARNING)
    segmenter = jieba.Tokenizer()
    segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
    segmenter.initialized = True
    return segmenter
