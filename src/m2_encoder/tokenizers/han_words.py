"""Words of runs of Chinese characters, as jieba finds them, several times faster.

jieba finds the path of dictionary words with the highest product of their frequencies, then joins the remaining single
characters by a hidden Markov model. Here the path is found on jieba's own dictionary in one pass, with precomputed
logarithms. The model is jieba's; the words that it must not join are kept here, because jieba keeps one set of them for
the whole process. Tests compare the words with jieba's.

Source: jieba 0.42, accurate mode.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Set
from functools import lru_cache, partial
from itertools import accumulate, groupby, pairwise, takewhile
from math import log
from operator import itemgetter
from typing import NamedTuple

from m2_encoder.errors import UserError
from m2_encoder.tokenizers.dictionary import DICTIONARY_FIX, UserWord, load_jieba, read_user_words

HAN = "\u4e00-\u9fd5"
"""The characters that jieba joins to words, as a range of a regular expression; other ideographs stand alone."""

_CACHED_RUNS = 1 << 14  # of a few hundred bytes each
_NO_WORD = 1.0  # of what only begins a word; logarithms of probabilities are below 0


class _Lexicon(NamedTuple):
    """A dictionary in memory."""

    scores: dict[str, float]  # logarithm of a word's probability, `_NO_WORD` for what only begins a word
    floor: float  # score of a character that the dictionary lacks
    # where the words of a run of single characters begin, by the hidden Markov model
    join: Callable[[str], tuple[int, ...]]
    others: re.Pattern[str] | None  # finds the words that are not of Chinese characters alone


class HanWords:
    """Words of Chinese runs; the dictionary is read at the first one (a second, 80 MB). Pickles without it.

    Args:
        user_dictionary: a UTF-8 file of words beyond jieba's own, in its format: `word [frequency] [tag]` a line.
        use_model: whether the hidden Markov model joins characters that the dictionary does not, as names.
        write: spells the user's words as the texts do, "" for one that they cannot hold; None for as they are. Must
            pickle where this object does.

    Raises:
        UserError: from the calls, if jieba is not installed or the user dictionary cannot be read or holds no words.
    """

    def __init__(
        self,
        *,
        user_dictionary: str | None = None,
        use_model: bool = True,
        write: Callable[[list[str]], list[str]] | None = None,
    ) -> None:
        self.user_dictionary = user_dictionary
        self.use_model = use_model
        self._write = write
        self._lexicon: _Lexicon | None = None
        # A cache that belongs to this object; captions repeat words like 一只 and 的.
        self._cached = lru_cache(maxsize=_CACHED_RUNS)(self._cut)

    def __call__(self, run: str) -> tuple[int, ...]:
        """Where the words of a run begin.

        `run` is of `HAN` alone, or of `HAN` and what jieba looks at together: `a-zA-Z0-9+#&._%-`.
        """
        return self._cached(run)

    def find_others(self, text: str) -> list[tuple[int, int]]:
        """Dictionary words that are not of Chinese characters alone, such as T恤 and C++: start and end of each.

        They count as they are written and in lower case, as some tokenizers leave them. A space is ▁, as in pieces.
        """
        pattern = (self._lexicon or self._load()).others
        spans = (match.span() for match in pattern.finditer(text)) if pattern else ()
        return [span for span in spans if _is_whole(text, *span)]

    def __reduce__(self) -> tuple[Callable[..., HanWords], tuple[()]]:
        user_dictionary, use_model, write = self.user_dictionary, self.use_model, self._write
        return partial(HanWords, user_dictionary=user_dictionary, use_model=use_model, write=write), ()

    def _cut(self, run: str) -> tuple[int, ...]:
        lexicon = self._lexicon or self._load()
        ends = _best_ends(run, lexicon)
        starts: list[int] = []
        start = single = 0  # of the word, and of the pending run of single characters
        while start < len(run):
            end = ends[start]
            if end - start > 1:
                if single < start:
                    starts += self._split_singles(run, single, start, lexicon)
                starts.append(start)
                single = end
            start = end
        if single < len(run):
            starts += self._split_singles(run, single, len(run), lexicon)
        return tuple(starts)

    def _split_singles(self, run: str, start: int, end: int, lexicon: _Lexicon) -> Iterable[int]:
        """Starts of the words of single characters, joined by the model unless they are a word of the dictionary."""
        if end - start == 1 or not self.use_model or lexicon.scores.get(run[start:end], _NO_WORD) != _NO_WORD:
            return range(start, end)
        return [start + place for place in lexicon.join(run[start:end])]

    def _load(self) -> _Lexicon:
        words = self._read_words()
        segmenter = load_jieba(words)
        apart = frozenset(word for word, frequency in words if frequency == 0)
        total = log(segmenter.total)
        frequencies: dict[str, int] = segmenter.FREQ
        self._lexicon = _Lexicon(
            scores={word: log(count) - total if count else _NO_WORD for word, count in frequencies.items()},
            floor=log(1) - total,
            join=lru_cache(maxsize=_CACHED_RUNS)(lambda run: tuple(_join(run, apart))),
            others=_compile_others(word for word, count in frequencies.items() if count),
        )
        return self._lexicon

    def _read_words(self) -> list[UserWord]:
        """The user's words, spelt as the texts are."""
        if self.user_dictionary is None:
            return []
        try:
            words = read_user_words(self.user_dictionary)
        except OSError as error:
            raise UserError(f"user dictionary {self.user_dictionary}: {error.strerror}; {DICTIONARY_FIX}") from error
        except ValueError as error:
            raise UserError(f"user dictionary {self.user_dictionary}: {error}") from error
        if self._write is None:
            return words
        written = self._write([word.text for word in words])
        return [word._replace(text=text) for word, text in zip(words, written, strict=True) if text]


def _join(run: str, apart: Set[str]) -> Iterator[int]:
    """Starts of the words of single characters: Chinese by the model, letters and digits in a row, the rest apart."""
    from jieba import finalseg

    start = 0
    for part in filter(None, finalseg.re_han.split(run)):
        if HAN[0] <= part[0] <= HAN[-1]:
            _, tags = finalseg.viterbi(part, "BMES", finalseg.start_P, finalseg.trans_P, finalseg.emit_P)
            # Of the tags, B begins a word of several characters, S is a word.
            places = [place for place, tag in enumerate(tags) if tag in "BS"]
            for first, end in pairwise((*places, len(part))):
                yield from range(start + first, start + end) if part[first:end] in apart else (start + first,)
        else:
            lengths = [len(word) for word in finalseg.re_skip.split(part) if word]
            yield from accumulate(lengths[:-1], initial=start)
        start += len(part)


def _best_ends(run: str, lexicon: _Lexicon) -> list[int]:
    """For every start, the end of the word that begins the best path from there."""
    scores = lexicon.scores.get
    length = len(run)
    ends = list(range(1, length + 1))
    best = [0.0] * (length + 1)
    for start in range(length - 1, -1, -1):
        highest = None
        end = start + 1
        score = scores(run[start])
        while score is not None:
            # Of equally probable paths, the one with the longer word, as in jieba.
            if score != _NO_WORD and (highest is None or score + best[end] >= highest):
                highest = score + best[end]
                ends[start] = end
            end += 1
            if end > length:
                break
            score = scores(run[start:end])
        best[start] = lexicon.floor + best[start + 1] if highest is None else highest
    return ends


def _compile_others(words: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern of the words that are not of Chinese characters alone, the longest that fits."""
    pure = re.compile(f"[{HAN}]+")
    others = {word.replace(" ", "▁") for word in words if not pure.fullmatch(word)}
    if not others:
        return None
    # As written and in lower case, as tokenizers leave it: ignoring case would cost ten times as much.
    forms = {form for word in others for form in (word, word.lower())}
    return re.compile(_spell(sorted(forms)))


def _spell(words: list[str]) -> str:
    """A pattern of sorted words, of which the longest fits; what they begin with alike is looked at once.

    A plain list of alternatives is tried one by one at every place of a text: thousands would cost milliseconds.
    """
    ends = zip(words[0], words[-1], strict=False)  # what these two share, all between them do
    prefix = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], ends))
    rests = [word[len(prefix) :] for word in words]
    branches = [_spell(list(group)) for _, group in groupby(filter(None, rests), key=itemgetter(0))]
    if not branches:
        return re.escape(prefix)
    return f"{re.escape(prefix)}(?:{'|'.join(branches)}){'' if rests[0] else '?'}"


def _is_whole(text: str, start: int, end: int) -> bool:
    """Whether a place does not cut a word of letters or digits: 小S is a word, the beginning of 小Sally is not."""
    edges = (text[max(0, start - 1) : start + 1], text[end - 1 : end + 1])
    return not any(len(edge) == 2 and edge.isascii() and edge.isalnum() for edge in edges)
