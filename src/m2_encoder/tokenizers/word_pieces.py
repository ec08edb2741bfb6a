"""Which word each piece of a text belongs to, for masking whole words.

SentencePiece normalises a text and cuts it into pieces, which joined are the normalised text. Words are found there, so
no offsets into the original are needed. Words are

* of Chinese characters: as jieba cuts them (`HanWords`), and in such texts its entries with letters, as T恤;
* letters and digits in a row, with their accents, an apostrophe inside (don't), a sign between digits (3.14, 10:30);
* any other character: punctuation, an emoji with what modifies it, several of the same in a row (……).

A word is a run of pieces. Words that share a piece count as one, because a word is masked whole or not at all; BPE
makes such pieces of frequent neighbours, as 红色的 of the official vocabulary.

Letters: B texts · T tokens of the longest text, template included.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from m2_encoder.tokenizers.han_words import HAN, HanWords
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer, TruncationSide
from m2_encoder.types import TextTokens

NO_WORD = -1
"""Word number of pieces that are no part of a word."""

_SPACE = "▁"  # how SentencePiece writes it
_SPECIAL = re.compile(r"\[[A-Za-z]\w*\]|<\|\w+\|>|</?\w+>")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_FIRST_HAN, _LAST_HAN = HAN[0], HAN[-1]
# Ideographs that jieba does not know, each a word: 々 and 〇, extensions, compatibility ideographs.
_LONE_IDEOGRAPHS = "\u3005\u3007\u3400-\u4dbf\u9fd6-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_MARK_CATEGORIES = {"Mn", "Mc", "Me", "Cf"}
_NOTHING = -1  # in place of a number of leading spaces: the piece holds nothing else


class WordPieces(NamedTuple):
    """Token ids and the words they belong to, of one text or of a batch.

    Attributes:
        ids: exactly those of the tokenizer's call, (T,) or (B, T) int64.
        mask: False at padding, (T,) or (B, T) bool.
        words: number of each piece's word, from 0 in the order of the text; `NO_WORD` for the template, padding,
            literal special pieces, spaces, and for words of which a character is unknown, since nobody can predict
            that. (T,) or (B, T) int32. Equal numbers are neighbours.
    """

    ids: Tensor
    mask: Tensor
    words: Tensor

    @property
    def text(self) -> TextTokens:
        """Ids and mask, as the tokenizer gives them."""
        return TextTokens(self.ids, self.mask)


class WordSegmenter:
    """Finds the words of texts and their pieces; pickles, so it can live in data loading workers.

    Args:
        tokenizer: makes the ids.
        user_dictionary: a UTF-8 file of words beyond jieba's own, in its format: `word [frequency] [tag]` a line. They
            are normalised as the texts are, so full-width letters and signs may be written either way.
        use_model: whether jieba's hidden Markov model joins characters that its dictionary does not.

    Raises:
        UserError: from the calls with a Chinese text, if jieba is not installed or the user dictionary cannot be
            read. The dictionary is read at the first such text and takes a second.

    Reference: whole word masking: BERT (arXiv:1810.04805, its release of May 2019); Chinese: arXiv:1906.08101.
    """

    def __init__(
        self, tokenizer: SentencePieceTokenizer, *, user_dictionary: str | None = None, use_model: bool = True
    ) -> None:
        self.tokenizer = tokenizer
        self._han = HanWords(user_dictionary=user_dictionary, use_model=use_model, write=self._normalise)
        self._has_user_words = user_dictionary is not None
        self._scan = _compile_scanner().findall
        pieces = tokenizer.pieces(range(tokenizer.vocab_size))
        self._special = special_ids(tokenizer)
        # A special piece separates words as a space does.
        self._texts = [_SPACE if index in self._special else piece for index, piece in enumerate(pieces)]
        self._leads = [_leading_spaces(text) for text in self._texts]
        self._bytes = {
            index: int(match[1], 16) for index, piece in enumerate(pieces) if (match := _BYTE.fullmatch(piece))
        }
        self._opaque = frozenset(self._bytes) | {tokenizer.unknown_id}

    def segment(
        self, text: str, *, context_length: int | None = None, truncation_side: TruncationSide | None = None
    ) -> WordPieces:
        """Ids and words of one text, (T,) each.

        A word that truncation cuts is the word of its remaining pieces.
        """
        batch = self.segment_batch([text], context_length=context_length, truncation_side=truncation_side)
        return WordPieces(*(part[0] for part in batch))

    def segment_batch(
        self,
        texts: Iterable[str],
        *,
        context_length: int | None = None,
        truncation_side: TruncationSide | None = None,
    ) -> WordPieces:
        """Ids and words of texts, (B, T) each, padded as the tokenizer does; (0, 0) without texts."""
        tokenizer = self.tokenizer
        texts = list(texts)
        kept = tokenizer.kept_pieces(context_length, truncation_side)
        rows = []
        for text, pieces in zip(texts, tokenizer.encode_all(texts), strict=True):
            rows.append((pieces[kept], self._words_of(text, pieces)[kept]))
        width = max((len(pieces) for pieces, _ in rows), default=-2) + 2
        ids = np.full((len(rows), width), tokenizer.end_id, dtype=np.int64)
        words = np.full((len(rows), width), NO_WORD, dtype=np.int32)
        mask = np.zeros((len(rows), width), dtype=np.bool_)
        if width:
            ids[:, 0] = tokenizer.cls_id
        for row, (pieces, numbers) in enumerate(rows):
            ids[row, 1 : len(pieces) + 1] = pieces
            words[row, 1 : len(pieces) + 1] = numbers
            mask[row, : len(pieces) + 2] = True
        return WordPieces(torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(words))

    def __reduce__(self) -> tuple[Callable[..., WordSegmenter], tuple[SentencePieceTokenizer]]:
        han = self._han
        make = partial(WordSegmenter, user_dictionary=han.user_dictionary, use_model=han.use_model)
        return make, (self.tokenizer,)

    def _words_of(self, text: str, ids: list[int]) -> list[int]:
        """Word number of each piece of a text, before truncation."""
        if not self._opaque.isdisjoint(ids):
            return self._words_of_opaque(text, ids)
        texts, leads = self._texts, self._leads
        parts = [texts[index] for index in ids]
        return _number(parts, [leads[index] for index in ids], self._starts("".join(parts)))

    def _words_of_opaque(self, text: str, ids: list[int]) -> list[int]:
        """As `_words_of`, where ids stand for bytes or for what the vocabulary lacks."""
        unknown = self.tokenizer.unknown_id
        parts = self._parts(text, ids)
        words = _number(parts, [_leading_spaces(part) for part in parts], self._starts("".join(parts)))
        lost = {words[place] for place, index in enumerate(ids) if index == unknown}
        if not lost:
            return words
        kept = sorted(set(words) - lost - {NO_WORD})  # the numbers stay without gaps
        renumbered = {number: place for place, number in enumerate(kept)}
        return [renumbered.get(number, NO_WORD) for number in words]

    def _parts(self, text: str, ids: list[int]) -> list[str]:
        """What each id of a text stands for; joined, the text in which words are looked for."""
        parts = [self._texts[index] for index in ids]
        if (unknown := self.tokenizer.unknown_id) in ids:
            cut = self.tokenizer.split(text)
            parts = [cut[place] if index == unknown else parts[place] for place, index in enumerate(ids)]
        _join_bytes([self._bytes.get(index) for index in ids], parts)
        return parts

    def _normalise(self, words: list[str]) -> list[str]:
        """Words of a dictionary as `_starts` sees them; "" for what holds a special piece, which no word does."""
        special = self._special - {self.tokenizer.unknown_id}
        rows = zip(words, self.tokenizer.encode_all(words), strict=True)
        forms = ["".join(self._parts(word, ids)) if special.isdisjoint(ids) else "" for word, ids in rows]
        return [form.strip(_SPACE).replace(_SPACE, " ") for form in forms]

    def _starts(self, text: str) -> set[int]:
        """Where the words of a normalised text begin."""
        starts: set[int] = set()
        has_mixture = self._add_starts(text, 0, starts)
        spans = self._han.find_others(text) if has_mixture or self._has_user_words else []
        if spans:
            # Words that jieba's dictionary spells with other characters stand first, and cut what is around them.
            starts.clear()
            end = 0
            for first, last in spans:
                self._add_starts(text[end:first], end, starts)
                starts.add(first)
                end = last
            self._add_starts(text[end:], end, starts)
        return starts

    def _add_starts(self, text: str, offset: int, starts: set[int]) -> bool:
        """Adds the starts of the words of a part of a text; says whether it has Chinese beside letters or digits."""
        has_han = has_letters = False
        last = ""
        for token in self._scan(text):
            word = token.lstrip(_SPACE)
            start = offset + len(token) - len(word)
            offset += len(token)
            if not word:
                continue
            if _FIRST_HAN <= word[0] <= _LAST_HAN:
                has_han = True
                starts.update([start + place for place in self._han(word)])
            elif token != last:  # …… and !!! are one word; words are never neighbours without a space
                has_letters = has_letters or word[0].isalnum()
                starts.add(start)
            last = word
        return has_han and has_letters


def special_ids(tokenizer: SentencePieceTokenizer) -> frozenset[int]:
    """Ids of pieces that are signs for a model and no text: `[CLS]`, `<|blank_2|>`, `</s>` and such.

    Never masked, and never put in a word's place. SentencePiece marks few of them as control pieces, since literal text
    may ask for them, so it goes by their form, too: a name in square brackets or in `<>`. Pieces of bytes are text.
    """
    pieces = tokenizer.pieces(range(tokenizer.vocab_size))
    named = (index for index, piece in enumerate(pieces) if _SPECIAL.fullmatch(piece) and not _BYTE.fullmatch(piece))
    own = (tokenizer.unknown_id, tokenizer.cls_id, tokenizer.end_id, tokenizer.mask_id)
    return frozenset((*named, *tokenizer.textless_ids, *own))


def _leading_spaces(text: str) -> int:
    """How many spaces a piece begins with, `_NOTHING` if it holds nothing else."""
    bare = len(text.lstrip(_SPACE))
    return len(text) - bare if bare or not text else _NOTHING


def _number(parts: list[str], leads: list[int], starts: set[int]) -> list[int]:
    """Numbers the words of pieces: one begins where a piece does, and nowhere inside a piece.

    `leads` counts the spaces before each piece, `_NOTHING` for spaces alone; `starts` are places in the joined text.
    """
    numbers = []
    number = NO_WORD
    place = 0
    for part, lead in zip(parts, leads, strict=True):
        if lead == _NOTHING:
            numbers.append(NO_WORD)
        else:
            if part and place + lead in starts:
                number += 1
            numbers.append(number)
        place += len(part)
    return numbers


def _join_bytes(values: list[int | None], parts: list[str]) -> None:
    """Replaces the texts of byte pieces: the first byte of a character stands for it, the others for nothing.

    `values` are the bytes, None where a piece is none; `parts` is changed in place.
    """
    place = 0
    while place < len(values):
        first = values[place]
        end = place + 1
        if first is not None:
            while end < len(values) and (value := values[end]) is not None and value & 0xC0 == 0x80:
                end += 1
            encoded = bytes(value for value in values[place:end] if value is not None)
            parts[place:end] = [encoded.decode("utf-8", "replace"), *[""] * (end - place - 1)]
        place = end


@lru_cache(maxsize=1)
def _compile_scanner() -> re.Pattern[str]:
    """Cuts a normalised text into Chinese runs, words of letters and digits, and the rest, each after its spaces."""
    marks = f"[{_mark_ranges()}\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]"  # and skin tones, and tags of flags
    letter = f"[^\\W_{HAN}{_LONE_IDEOGRAPHS}]"
    run = f"{letter}(?:{letter}|{marks})*"
    word = f"{run}(?:(?:['’]|(?<=[0-9])[.,:](?=[0-9])){run})*"
    flag = "[\U0001f1e6-\U0001f1ff]{2}"
    other = f".(?:\u200d.|{marks})*"
    return re.compile(f"{_SPACE}*(?:[{HAN}]+|{word}|{flag}|{other}|$)", re.DOTALL)


def _mark_ranges() -> str:
    """What belongs to the character before it, as ranges: accents, vowel signs, and signs that nobody sees."""
    codes = [code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) in _MARK_CATEGORIES]
    # Neighbours have the same difference from their index.
    runs = [[code for _, code in group] for _, group in groupby(enumerate(codes), lambda pair: pair[1] - pair[0])]
    return "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in runs)
