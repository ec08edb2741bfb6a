from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.data.masking.text_masking import (
    MaskVocabulary,
    choose_words,
    mask_words,
)
from m2_encoder.data.order.keyed_random import mix
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.tokenizers.word_pieces import NO_WORD, WordPieces, WordSegmenter, special_ids
from m2_encoder.types import MaskedText

VOCABULARY = MaskVocabulary(mask_id=3, replacements=np.arange(10, 1000))
# Words of 1, 3, 1, 2, 4 and 1 pieces; a space and a special piece between them.
WORDS = [NO_WORD, 0, 1, 1, 1, NO_WORD, 2, 3, 3, NO_WORD, 4, 4, 4, 4, 5, NO_WORD]
PIECES = WordPieces(
    ids=torch.arange(2000, 2000 + len(WORDS)),
    mask=torch.ones(len(WORDS), dtype=torch.bool),
    words=torch.tensor(WORDS, dtype=torch.int32),
)


def _repeated(pieces: WordPieces, times: int) -> WordPieces:
    return WordPieces(*(part.repeat(times, 1) for part in pieces))


def _mask_one(
    pieces: WordPieces, *, ratio: float, key: int, vocabulary: MaskVocabulary = VOCABULARY, **shares: float
) -> MaskedText:
    batch = WordPieces(*(part[None] for part in pieces))
    masked = mask_words(batch, ratio=ratio, vocabulary=vocabulary, keys=[key], **shares)
    return MaskedText(*(part[0] for part in masked))


def _keys(count: int, seed: int) -> list[int]:
    return [mix(seed, index) for index in range(count)]


@pytest.mark.parametrize("ratio", [0.1, 0.15, 0.3, 0.5, 0.8, 1.0])
def test_ratio_is_right_on_average_and_near_in_each(ratio: float) -> None:
    times = 4000
    masked = mask_words(_repeated(PIECES, times), ratio=ratio, vocabulary=VOCABULARY, keys=_keys(times, 1))
    counts = masked.predicted.sum(dim=1).double()
    wanted = ratio * 12
    # Within a word of four pieces.
    assert float((counts - wanted).abs().max()) < 4
    # The first word is taken whole; if it is shorter than what is wanted, the others fill up to that on average.
    expected = sum(max(wanted, size) for size in (1, 3, 1, 2, 4, 1)) / 6
    assert float(counts.mean()) == pytest.approx(expected, abs=4 * float(counts.std()) / times**0.5 + 1e-9)


def test_every_word_is_chosen() -> None:
    times = 4000
    masked = mask_words(_repeated(PIECES, times), ratio=0.5, vocabulary=VOCABULARY, keys=_keys(times, 2))
    shares = masked.predicted.double().mean(dim=0)
    first = [WORDS.index(word) for word in range(6)]
    # Of two halves of a random order none is privileged: each word is in the first with probability 1/2.
    assert torch.allclose(shares[first], torch.full((6,), 0.5, dtype=torch.float64), atol=4 * 0.5 / times**0.5)


def test_replacement_shares() -> None:
    times = 3000
    masked = mask_words(_repeated(PIECES, times), ratio=1.0, vocabulary=VOCABULARY, keys=_keys(times, 3))
    hidden = masked.ids[masked.predicted]
    count = len(hidden)
    assert count == 12 * times
    kept = (hidden >= 2000).double().mean()
    replaced = hidden[(hidden >= 10) & (hidden < 1000)]
    for share, expected in ((float((hidden == 3).double().mean()), 0.8), (len(replaced) / count, 0.1), (kept, 0.1)):
        assert float(share) == pytest.approx(expected, abs=4 * (expected * (1 - expected) / count) ** 0.5)
    # Random pieces are spread over all that are allowed: 990 of them, 3600 draws.
    assert Counter((replaced // 100).tolist()).keys() == set(range(10))
    # Each piece decides by itself: words are seldom replaced as a whole.
    long_word = masked.ids[:, 10:14]
    assert float((long_word == 3).all(dim=1).double().mean()) == pytest.approx(0.8**4, abs=0.04)


@pytest.mark.parametrize(
    ("mask_share", "random_share", "low", "high"), [(1, 0, 3, 3), (0, 1, 10, 999), (0, 0, 2000, 2015)]
)
def test_one_kind_of_replacement(mask_share: float, random_share: float, low: int, high: int) -> None:
    masked = _mask_one(PIECES, ratio=1.0, mask_share=mask_share, random_share=random_share, key=4)
    hidden = masked.ids[masked.predicted]
    assert int(hidden.min()) >= low
    assert int(hidden.max()) <= high


def test_same_key_same_mask_and_other_key_another() -> None:
    first, again, other = (_mask_one(PIECES, ratio=0.5, key=mix(seed)) for seed in (5, 5, 6))
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.predicted, again.predicted)
    assert not torch.equal(first.ids, other.ids)


@pytest.mark.parametrize("words", [[], [NO_WORD, NO_WORD]])
def test_nothing_is_predicted_without_words(words: list[int]) -> None:
    pieces = WordPieces(
        ids=torch.arange(len(words)),
        mask=torch.ones(len(words), dtype=torch.bool),
        words=torch.tensor(words, dtype=torch.int32),
    )
    masked = _mask_one(pieces, ratio=1.0, key=7)
    assert torch.equal(masked.ids, pieces.ids)
    assert not bool(masked.predicted.any())


def test_the_word_that_overshoots_is_taken_by_chance() -> None:
    words = np.array([[0, 1, 1, 1, 1]], dtype=np.int32)
    order = np.array([[0.1, 0.2, 0, 0, 0]])  # only the first piece of a word counts

    def hidden(chance: float) -> list[bool]:
        return choose_words(words, 0.4, order=order, chance=np.full((1, 5), chance)).tolist()[0]

    # Two pieces are wanted, one is there, the next word has four: it is taken with probability 1/4.
    assert hidden(0.24) == [True] * 5
    assert hidden(0.26) == [True, False, False, False, False]


def test_vocabulary_holds_no_special_pieces() -> None:
    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model())
    vocabulary = MaskVocabulary.of(tokenizer)
    special = special_ids(tokenizer)
    assert vocabulary.mask_id == tokenizer.mask_id
    assert special.isdisjoint(vocabulary.replacements.tolist())
    assert len(vocabulary.replacements) == tokenizer.vocab_size - len(special)


def test_captions_keep_a_chinese_word_together() -> None:
    pytest.importorskip("jieba", reason="words of Chinese texts need the extra `words`")
    segmenter = WordSegmenter(SentencePieceTokenizer(load_emoji_tokenizer_model()))
    pieces = segmenter.segment("北京清华大学")
    vocabulary = MaskVocabulary.of(segmenter.tokenizer)
    shares = {"mask_share": 1.0, "random_share": 0.0}
    masked = (_mask_one(pieces, ratio=0.5, vocabulary=vocabulary, key=mix(seed), **shares) for seed in range(40))
    seen = {segmenter.tokenizer.decode(each.ids) for each in masked}
    # Three pieces are wanted: of 2 + 4, the second word is taken after the first with probability 1/4.
    assert seen == {"北京" + 4 * "[MASK]", 2 * "[MASK]" + "清华大学", 6 * "[MASK]"}
