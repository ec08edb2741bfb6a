"""Hiding whole words of captions, for predicting them from the image and the rest of the text.

Which words: they are put in random order and taken until the wanted number of pieces, `ratio` times those that belong
to words, is reached. The word that would overshoot is taken with the probability that makes the expected number of
pieces exactly the wanted one, so the number is within a word of it and right on average. The first word is always
taken, so that a text with words never stays whole; with it, the mean over the words of max(wanted, pieces of the word)
is expected: more than wanted in short texts, 1 piece of 1 instead of 0.5.

What stands in their place is drawn for each piece by itself: `[MASK]`, a random piece, or the piece as it was, of which
the model cannot know that it is right.

Reference: BERT (arXiv:1810.04805) for the replacement, and its release of May 2019 for whole words.

Legend: B texts · T tokens of the longest text, template included · V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from m2_encoder.data.order.keyed_random import uniforms
from m2_encoder.errors import UserError
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.tokenizers.word_pieces import NO_WORD, WordPieces, special_ids
from m2_encoder.types import MaskedText

_DRAWS = 4  # per piece: order of its word, whether the last word is taken, what replaces it, which random piece


class TextMasking(NamedTuple):
    """How much is hidden, and by what; `checked` says whether it makes sense."""

    # share of the pieces of words to predict, in (0, 1]. Published: 0.15 for text alone, 0.50 beside an image.
    ratio: float
    mask_share: float = 0.8  # share of these that becomes `[MASK]`
    random_share: float = 0.1  # share that becomes a random piece; the rest stays as it is

    def checked(self) -> TextMasking:
        """The same.

        Raises:
            UserError: if a share is not within 0 and 1, or both together are above 1, or nothing would be predicted.
        """
        if not 0 < self.ratio <= 1:
            raise UserError(f"ratio={self.ratio} must be above 0 and at most 1: the share of a text to predict")
        shares = (self.mask_share, self.random_share)
        if not all(0 <= share <= 1 for share in shares) or sum(shares) > 1 + 1e-9:
            raise UserError(
                f"mask_share={self.mask_share} and random_share={self.random_share} must be at least 0 and at most 1 "
                "together; what is left of 1 stays as it is"
            )
        return self


class MaskVocabulary(NamedTuple):
    """What may stand in a word's place."""

    mask_id: int  # id of `[MASK]`
    replacements: npt.NDArray[np.int64]  # ids of the pieces that are no special ones, (≤ V,) int64

    @classmethod
    def of(cls, tokenizer: SentencePieceTokenizer) -> MaskVocabulary:
        """Those of a tokenizer."""
        return cls(
            mask_id=tokenizer.mask_id,
            replacements=np.setdiff1d(np.arange(tokenizer.vocab_size), [*special_ids(tokenizer)]),
        )


def mask_words(pieces: WordPieces, *, masking: TextMasking, vocabulary: MaskVocabulary, key: int) -> MaskedText:
    """Hides words of one text.

    Args:
        pieces: of a text, (T,).
        masking: how much, and by what.
        vocabulary: what may stand in a word's place.
        key: decides everything else, 64 bits, as of `keyed.mix`.

    Returns:
        Ids and what is to be predicted, (T,) each. A text without words, such as an empty one, stays as it is, and
        nothing is predicted.

    Raises:
        UserError: if `masking` makes no sense.
    """
    batch = WordPieces(*(part[None] for part in pieces))
    masked = mask_words_of_batch(batch, masking=masking, vocabulary=vocabulary, keys=[key])
    return MaskedText(*(part[0] for part in masked))


def mask_words_of_batch(
    pieces: WordPieces, *, masking: TextMasking, vocabulary: MaskVocabulary, keys: Sequence[int]
) -> MaskedText:
    """Hides words of texts: of each exactly what `mask_words` hides with its key, whatever it is padded to.

    Args:
        pieces: of the texts, (B, T).
        masking: how much, and by what.
        vocabulary: what may stand in a word's place.
        keys: one per text.

    Returns:
        Ids and what is to be predicted, (B, T) each.

    Raises:
        UserError: if `masking` makes no sense.
    """
    masking.checked()
    ids, words = pieces.ids.numpy(), pieces.words.numpy()
    assert len(keys) == len(ids), f"{len(keys)} keys for {len(ids)} texts"
    # The same numbers for a piece, however many follow it.
    order, chance, kind, which = np.moveaxis(uniforms(keys, ids.shape[1] * _DRAWS).reshape(*ids.shape, _DRAWS), -1, 0)
    predicted = choose_words(words, masking.ratio, order=order, chance=chance)
    is_mask = kind < masking.mask_share
    is_random = ~is_mask & (kind < masking.mask_share + masking.random_share)
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
    """Which pieces belong to chosen words; the module's head says how they are chosen.

    Args:
        words: word number of each piece, equal ones neighbours, `NO_WORD` for none; (B, T).
        ratio: wanted share of the pieces of words.
        order: random numbers in [0, 1); a word's place in the random order is the one of its first piece. (B, T)
        chance: further ones; that of a word's first piece decides whether it is taken if it overshoots. (B, T)

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
