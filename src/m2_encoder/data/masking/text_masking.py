"""Whole-word masking of captions.

Words are taken in random order until `ratio` of all pieces of words are hidden. The word that would overshoot is taken
with the probability that makes the expected number of hidden pieces exact. The first word is always taken, so short
texts hide more: 1 piece of 1 instead of 0.5. Each hidden piece becomes `[MASK]`, a random piece, or stays.

Reference: BERT (arXiv:1810.04805) for the replacement, and its release of May 2019 for whole words.

Letters: B texts · T tokens of the longest text, template included · V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from m2_encoder.data.order.keyed_random import uniforms
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.tokenizers.word_pieces import NO_WORD, WordPieces, special_ids
from m2_encoder.types import MaskedText

_DRAWS = 4  # per piece: order of its word, whether the last word is taken, what replaces it, which random piece


class MaskVocabulary(NamedTuple):
    """Ids that replace hidden pieces."""

    mask_id: int  # of `[MASK]`
    replacements: npt.NDArray[np.int64]  # all but special pieces, (≤ V,) int64

    @classmethod
    def of(cls, tokenizer: SentencePieceTokenizer) -> MaskVocabulary:
        """The ids of a tokenizer."""
        return cls(
            mask_id=tokenizer.mask_id,
            replacements=np.setdiff1d(np.arange(tokenizer.vocab_size), [*special_ids(tokenizer)]),
        )


def mask_words(
    pieces: WordPieces,
    *,
    ratio: float,
    vocabulary: MaskVocabulary,
    keys: Sequence[int],
    mask_share: float = 0.8,
    random_share: float = 0.1,
) -> MaskedText:
    """Hide words of texts, each by its own key, whatever it is padded to.

    Args:
        pieces: of the texts, (B, T).
        ratio: share of the pieces of words to predict, in (0, 1]. Published: 0.15 for text alone, 0.50 beside an image.
        vocabulary: replaces hidden pieces.
        keys: random 64 bits per text, as `keyed_random.mix` makes them.
        mask_share: share of hidden pieces that become `[MASK]`.
        random_share: share that become a random piece; the rest stays.

    Returns:
        Ids and what to predict, (B, T) each. In a text without words nothing is predicted.
    """
    ids, words = pieces.ids.numpy(), pieces.words.numpy()
    assert len(keys) == len(ids), f"{len(keys)} keys for {len(ids)} texts"
    # The same numbers for a piece, however many follow it.
    order, chance, kind, which = np.moveaxis(uniforms(keys, ids.shape[1] * _DRAWS).reshape(*ids.shape, _DRAWS), -1, 0)
    predicted = choose_words(words, ratio, order=order, chance=chance)
    is_mask = kind < mask_share
    is_random = ~is_mask & (kind < mask_share + random_share)
    # A number of 53 bits below 1 times a count stays below the count.
    others = vocabulary.replacements[(which * len(vocabulary.replacements)).astype(np.int64)]
    masked = np.where(predicted & is_mask, vocabulary.mask_id, np.where(predicted & is_random, others, ids))
    return MaskedText(torch.from_numpy(masked), torch.from_numpy(predicted))


def choose_words(
    words: npt.NDArray[np.int32],
    ratio: float,
    *,
    order: npt.NDArray[np.float64],
    chance: npt.NDArray[np.float64],
) -> npt.NDArray[np.bool_]:
    """Which pieces belong to hidden words.

    Args:
        words: word number of each piece, `NO_WORD` for none; pieces of a word are neighbours. (B, T)
        ratio: share of the pieces of words to hide.
        order: in [0, 1); that of its first piece is a word's place in the random order. (B, T)
        chance: in [0, 1); that of its first piece decides whether a word that overshoots is taken. (B, T)

    Returns:
        (B, T) bool; all or none of a word's pieces.
    """
    is_word = words != NO_WORD
    begins = is_word.copy()
    begins[:, 1:] &= words[:, 1:] != words[:, :-1]
    # The place of each piece's first one: the last place so far where a word begins.
    first = np.maximum.accumulate(np.where(begins, np.arange(words.shape[1]), 0), axis=1)
    key = np.where(is_word, np.take_along_axis(order, first, axis=1), math.inf)
    # A stable order keeps the pieces of a word together, in their order.
    ranking = np.argsort(key, axis=1, kind="stable")
    rank = np.empty_like(ranking)
    np.put_along_axis(rank, ranking, np.arange(words.shape[1])[None], axis=1)
    before = np.take_along_axis(rank, first, axis=1)  # pieces of the words that come first
    size = _sizes(begins, is_word)
    wanted = ratio * is_word.sum(axis=1, keepdims=True)
    overshoot = np.take_along_axis(chance, first, axis=1) * size
    return is_word & ((before + overshoot < wanted) | (before == 0))


def _sizes(begins: npt.NDArray[np.bool_], is_word: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """How many pieces the word of each piece has; anything where there is none; (B, T)."""
    number = np.cumsum(begins, axis=None).reshape(begins.shape)  # counts through all rows
    return np.bincount(number[is_word], minlength=int(number.max(initial=0)) + 1)[number]
