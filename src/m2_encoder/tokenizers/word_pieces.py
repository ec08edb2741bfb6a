"""Which word each piece of a text belongs to, for masking whole words.

SentencePiece normalises a text and cuts it into pieces; joined again they *are* the normalised text, so words are
looked for there, and no offsets into the original are needed: full-width letters, ligatures, combining marks,
zero-width and control characters have already become what the model sees. Words are

* of Chinese characters: as jieba cuts them (`HanWords`), with its entries such as T恤;
* letters and digits in a row, with their accents, an apostrophe inside (don't), a point or comma between digits (3.14);
* any other character: punctuation, an emoji with what modifies it, several of the same in a row (……).

A word is a run of pieces. Where a piece reaches over the border of two words, both are one word here, because a word
is masked whole or not at all; BPE does that with frequent neighbours, as 红色的 of the official vocabulary.

Legend: B texts · T tokens of the longest text, template included.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from m2_encoder.tokenizers.han_words import HAN, HanWords
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer, TruncationSide

NO_WORD = -1
"""Word number of pieces that are no part of a word."""

_SPACE = "▁"  # how SentencePiece writes it
_SPECIAL = re.compile(r"\[[A-Za-z]+\]|<\|\w+\|>|</?\w+>")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACES_ONLY, _UNKNOWN, _BYTES = range(-3, 0)  # in place of a piece's number of leading spaces


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


class WordSegmenter:
    """Finds the words of texts and their pieces; pickles, so it can live in data loading workers.

    Args:
        tokenizer: makes the ids.
        user_dictionary: a UTF-8 file of words beyond jieba's own, in its format: `word [frequency] [tag]` a line.
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
        self._han = HanWords(user_dictionary=user_dictionary, use_model=use_model)
        self._always_others = user_dictionary is not None
        self._scan = _compile_scanner()
        pieces = tokenizer.pieces(range(tokenizer.vocab_size))
        special = special_ids(tokenizer)
        # A special piece separates words as a space does.
        self._texts = [_SPACE if index in special else piece for index, piece in enumerate(pieces)]
        self._leads = [_leading_spaces(text) for text in self._texts]
        self._byte_ids = frozenset(index for index, piece in enumerate(pieces) if _BYTE.fullmatch(piece))
        self._hard_ids = self._byte_ids | {tokenizer.unknown_id}

    def segment(
        self, text: str, *, context_length: int | None = None, truncation_side: TruncationSide | None = None
    ) -> WordPieces:
        """Ids and words of one text, (T,) each.

        A word that truncation cuts is the word of its remaining pieces.

        Args:
            text: any string.
            context_length: most tokens, template included; None for the tokenizer's own.
            truncation_side: "left" keeps the end, "right" the beginning; None for the tokenizer's own.

        Raises:
            UserError: as the tokenizer's call, and see the class.
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
        """Ids and words of texts, (B, T) each, padded as the tokenizer does; (0, 0) without texts.

        Args:
            texts: any iterable of strings.
            context_length: as in `segment`.
            truncation_side: as in `segment`.

        Raises:
            UserError: as the tokenizer's call, and see the class.
        """
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

    def __reduce__(
        self,
    ) -> tuple[Callable[..., WordSegmenter], tuple[SentencePieceTokenizer, str | None, bool]]:
        return _rebuild, (self.tokenizer, self._han.user_dictionary, self._han.use_model)
