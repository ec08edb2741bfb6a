"""Words of pieces against a plain reading of the rules, character by character and with jieba itself."""

from __future__ import annotations

import pickle
import unicodedata
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.data.masking.text_masking import MaskVocabulary, mask_words
from m2_encoder.data.order.keyed_random import mix
from m2_encoder.tokenizers.dictionary import load_jieba
from m2_encoder.tokenizers.han_words import HanWords
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.tokenizers.word_pieces import NO_WORD, WordPieces, WordSegmenter, special_ids

pytest.importorskip("jieba", reason="words of Chinese texts need the extra `words`")

LONG = 4096  # no text here is cut

_CHUNKS = [
    *"一二只红色的苹果和猫在上了麒麟貔貅豈㐀𠀀々〇ー",
    *["一只", "红色的", "乒乓球拍卖完了", "北京清华大学", "网易杭研大厦", "T恤", "B超", "小S", "卡拉OK", "c++"],
    *[
        "cat",
        "Cats",
        "the",
        "isn't",
        "rock’n’roll",
        "café",
        "e\u0301",
        "Łódź",
        "naïve",
        "Sally",
        "кошка",
        "猫です",
        "서울",
    ],
    *["1", "23", "3.14", "1,000", "10:30", "iPhone15", "4x4", "x1"],
    *[".", ",", "，", "。", "！！", "……", "?!", "-", "_", "'", "’", "(", "）", "#", "%", "$", "&", "/"],
    *["👍", "👍🏽", "👩\u200d🚀", "🇨🇳", "🇨", "❤️", "1️⃣", "🎉🎉", "🏴󠁧󠁢󠁥󠁮󠁧󠁿"],
    *[" ", "  ", "   ", "\t", "\n", "\u3000", "\u00a0", "\u200b", "\u200d", "\ufeff", "\u00ad", "\u0301"],
    *["[MASK]", "[CLS]", "<|endoftext|>", "[UNK]", "[SEP]", "<|blank_3|>", "<unk>", "<0x41>", "▁"],
    *["ＡＢＣ", "１２", "ﬁ", "½", "㍿", "①", "\ud83d", "\ude00", "\u0000", "กำลัง", "हिन्दी", "العربية"],
]
texts = st.one_of(
    st.lists(st.sampled_from(_CHUNKS), max_size=14).map("".join),
    st.lists(st.sampled_from(_CHUNKS), max_size=10).map(" ".join),
    st.text(max_size=20),
)
examples = settings(max_examples=100)


@lru_cache(maxsize=1)
def _jieba() -> Any:
    return load_jieba()


@lru_cache(maxsize=1)
def _entries() -> HanWords:
    return HanWords()


@lru_cache(maxsize=2)
def _special(tokenizer: SentencePieceTokenizer) -> frozenset[int]:
    return special_ids(tokenizer)


@lru_cache(maxsize=2)
def _vocabulary(tokenizer: SentencePieceTokenizer) -> MaskVocabulary:
    return MaskVocabulary.of(tokenizer)


def _is_han(character: str) -> bool:
    return "\u4e00" <= character <= "\u9fd5"


def _is_ideograph(character: str) -> bool:
    name = unicodedata.name(character, "")
    return "IDEOGRAPH" in name and name.startswith(("CJK", "IDEOGRAPHIC")) and unicodedata.category(character) != "So"


def _is_letter(character: str) -> bool:
    return character.isalnum() and not _is_ideograph(character) and character not in "々〇"


def _is_mark(character: str) -> bool:
    tagged = "\U0001f3fb" <= character <= "\U0001f3ff" or "\U000e0020" <= character <= "\U000e007f"
    return tagged or unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf")


def _letters_end(text: str, start: int) -> int:
    end = start
    while end < len(text):
        inside = end > start
        following = text[end + 1 : end + 2]
        joins = inside and following != "" and _is_letter(following)
        digits = joins and text[end - 1] in "0123456789" and following in "0123456789"
        if _is_letter(text[end]) or (inside and _is_mark(text[end])):
            end += 1
        elif (joins and text[end] in "'’") or (digits and text[end] in ".,:"):
            end += 2
        else:
            break
    return end


def _other_end(text: str, start: int) -> int:
    flag = text[start : start + 2]
    if len(flag) == 2 and all("\U0001f1e6" <= character <= "\U0001f1ff" for character in flag):
        return start + 2
    end = start + 1
    while end < len(text):
        if text[end] == "\u200d" and text[end + 1 : end + 2] not in ("", "▁"):  # a joiner joins no space
            end += 2
        elif _is_mark(text[end]):
            end += 1
        else:
            break
    return end


def _plain_words(text: str) -> list[str]:
    """Words of a normalised text without special pieces, and its spaces."""
    words: list[str] = []
    start = 0
    last = ""
    while start < len(text):
        end = start + 1
        if _is_han(text[start]):
            while end < len(text) and _is_han(text[end]):
                end += 1
            words += _jieba().lcut(text[start:end])
        elif text[start] == "▁":
            words.append("▁")
        elif _is_letter(text[start]):
            end = _letters_end(text, start)
            words.append(text[start:end])
        else:
            end = _other_end(text, start)
            word = text[start:end]
            if word == last:
                words[-1] += word  # …… is one word
            else:
                words.append(word)
            last = word
            start = end
            continue
        last = ""
        start = end
    return words


def _is_mixture(text: str) -> bool:
    """Whether a text has Chinese and a word that begins with a letter or digit."""
    return any(map(_is_han, text)) and any(word[0].isalnum() and not _is_han(word[0]) for word in _plain_words(text))


def _words(text: str, *, is_mixture: bool) -> list[str]:
    """As `_plain_words`, in mixtures with the dictionary's entries of Chinese and letters, such as T恤."""
    words, end = [], 0
    for first, last in _entries().find_others(text) if is_mixture else []:
        words += [*_plain_words(text[end:first]), text[first:last]]
        end = last
    return words + _plain_words(text[end:])


def _segments(tokenizer: SentencePieceTokenizer, text: str) -> list[list[tuple[int, bytes]]]:
    """Places and UTF-8 of the pieces of a text, cut at special pieces."""
    special = _special(tokenizer) - {tokenizer.unknown_id}
    segments: list[list[tuple[int, bytes]]] = [[]]
    parts = tokenizer.split(text)
    ids = tokenizer.encode(text)
    for place, (index, part) in enumerate(zip(ids, parts, strict=True)):
        if index in special:
            segments.append([])
        elif part.startswith("<0x") and len(part) == 6 and tokenizer.pieces([index]) == [part]:
            segments[-1].append((place, bytes([int(part[3:5], 16)])))
        else:
            segments[-1].append((place, part.encode()))
    return segments


def _expected_numbers(tokenizer: SentencePieceTokenizer, text: str) -> list[int]:
    """Word numbers by the definition: words that share a piece are one; those with an unknown piece are none."""
    ids = tokenizer.encode(text)
    owners: list[set[int]] = [set() for _ in ids]  # the words of each piece
    spans: list[tuple[int, int]] = []
    segments = _segments(tokenizer, text)
    is_mixture = _is_mixture("▁".join(b"".join(part for _, part in segment).decode() for segment in segments))
    for segment in segments:
        content = b"".join(part for _, part in segment)
        offset = 0
        for word in _words(content.decode(), is_mixture=is_mixture):
            stop = offset + len(word.encode())
            start = 0
            for place, part in segment:
                if word != "▁" and start < stop and start + len(part) > offset:
                    owners[place].add(len(spans))
                start += len(part)
            spans.append((offset, stop))
            offset = stop
    groups = list(range(len(spans)))
    for words in owners:
        for word in words:
            groups = [groups[min(words)] if group == groups[word] else group for group in groups]
    lost = {groups[word] for index, words in zip(ids, owners, strict=True) for word in words if index == 0}
    numbers: dict[int, int] = {}
    expected = []
    for words in owners:
        group = groups[min(words)] if words else None
        expected.append(NO_WORD if group is None or group in lost else numbers.setdefault(group, len(numbers)))
    return expected


@pytest.fixture(scope="module")
def embedded() -> WordSegmenter:
    return WordSegmenter(SentencePieceTokenizer(load_emoji_tokenizer_model()))


@pytest.fixture(scope="module")
def official(parity_dir: Path) -> WordSegmenter:
    return WordSegmenter(SentencePieceTokenizer(parity_dir / "tokenizer" / "sp.model"))


@pytest.fixture(scope="module", params=["embedded", "official"])
def segmenter(request: pytest.FixtureRequest) -> WordSegmenter:
    found: WordSegmenter = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def worker(segmenter: WordSegmenter) -> WordSegmenter:
    """As a worker gets it."""
    copied: WordSegmenter = pickle.loads(pickle.dumps(segmenter))
    return copied


@examples
@given(text=texts)
def test_words_follow_the_rules(segmenter: WordSegmenter, text: str) -> None:
    pieces = segmenter.segment(text, context_length=LONG)
    assert torch.equal(pieces.ids, segmenter.tokenizer(text, LONG).ids[0])
    assert pieces.words.tolist() == [NO_WORD, *_expected_numbers(segmenter.tokenizer, text), NO_WORD]


@examples
@given(batch=st.lists(texts, max_size=5), context_length=st.integers(2, 20), side=st.sampled_from(["left", "right"]))
def test_batches_and_truncation(segmenter: WordSegmenter, batch: list[str], context_length: int, side: Any) -> None:
    pieces = segmenter.segment_batch(batch, context_length=context_length, truncation_side=side)
    tokens = segmenter.tokenizer(batch, context_length, side)
    assert torch.equal(pieces.ids, tokens.ids)
    assert torch.equal(pieces.mask, tokens.mask)
    kept = segmenter.tokenizer.kept_pieces(context_length, side)
    for row, text in enumerate(batch):
        whole = segmenter.segment(text, context_length=LONG).words.tolist()[1:-1]
        expected = [NO_WORD, *whole[kept], NO_WORD]
        assert pieces.words[row, : len(expected)].tolist() == expected
        assert set(pieces.words[row, len(expected) :].tolist()) <= {NO_WORD}


@examples
@given(
    batch=st.lists(texts, min_size=1, max_size=4),
    ratio=st.floats(0.01, 1),
    shares=st.sampled_from([(0.8, 0.1), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, 0.5)]),
    seed=st.integers(0, 2**32),
)
def test_words_are_hidden_whole(
    segmenter: WordSegmenter,
    worker: WordSegmenter,
    batch: list[str],
    ratio: float,
    shares: tuple[float, float],
    seed: int,
) -> None:
    masking = {"ratio": ratio, "mask_share": shares[0], "random_share": shares[1]}
    vocabulary = _vocabulary(segmenter.tokenizer)
    pieces = segmenter.segment_batch(batch)

    keys = [mix(seed, row) for row in range(len(batch))]
    masked = mask_words(pieces, **masking, vocabulary=vocabulary, keys=keys)
    special = _special(segmenter.tokenizer)
    for row, text in enumerate(batch):
        ids, words = pieces.ids[row].tolist(), pieces.words[row].tolist()
        hidden = masked.predicted[row].tolist()
        chosen = {word for word, is_hidden in zip(words, hidden, strict=True) if is_hidden}
        assert hidden == [word in chosen for word in words]
        assert NO_WORD not in chosen
        assert bool(chosen) == any(word != NO_WORD for word in words)
        sizes = Counter(word for word in words if word != NO_WORD)
        assert not sizes or abs(sum(hidden) - ratio * sizes.total()) < max(sizes.values()), "within a word of the ratio"
        for before, after, is_hidden in zip(ids, masked.ids[row].tolist(), hidden, strict=True):
            assert after == before or is_hidden
            assert not (is_hidden and before in special)
            assert after == before or after == vocabulary.mask_id or after not in special
        single = WordPieces(*(part[None] for part in segmenter.segment(text)))
        alone = mask_words(single, **masking, vocabulary=vocabulary, keys=[keys[row]])
        length = alone.ids.shape[1]
        assert torch.equal(alone.ids[0], masked.ids[row, :length])
        assert torch.equal(alone.predicted[0], masked.predicted[row, :length])
    copied = worker.segment_batch(batch)
    again = mask_words(copied, **masking, vocabulary=vocabulary, keys=keys)
    assert all(map(torch.equal, (*copied, *again), (*pieces, *masked)))
