"""Words of captions in both languages: Chinese has no spaces, so jieba finds them.

jieba takes about a second to read its dictionary, at the first Chinese text.
"""

from __future__ import annotations

import logging
import re
import warnings
from functools import lru_cache
from typing import Any

from m2_encoder.errors import UserError

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


def load_jieba(user_dictionary: str | None = None) -> Any:
    """A jieba tokenizer of our own, in about a second; jieba's shared one keeps a file in a folder open to everybody.

    Args:
        user_dictionary: a UTF-8 file of words in jieba's format, `word [frequency] [tag]` a line.

    Returns:
        A `jieba.Tokenizer` with its dictionary in memory.

    Raises:
        UserError: if the file cannot be read or is no such dictionary, or if jieba is not installed.
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
    if user_dictionary is not None:
        try:
            with open(user_dictionary, "rb") as file:
                segmenter.load_userdict(file)
        except (OSError, ValueError) as error:
            raise UserError(
                f"user dictionary {user_dictionary}: {error}; give a UTF-8 file with `word [frequency] [tag]` a line"
            ) from error
    return segmenter


@lru_cache(maxsize=1)
def _segmenter() -> Any:
    return load_jieba()
