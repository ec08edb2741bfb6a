from __future__ import annotations

import random
from typing import Any

import pytest

from m2_encoder.tokenizers import words
from m2_encoder.tokenizers.dictionary import load_jieba


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("A well-known cat, isn't it?", "en", ["A", "well-known", "cat", "isn't", "it"]),
        ("", "en", []),
        ("…!", "en", []),
        ("我来到北京清华大学。", "zh", ["我", "来到", "北京", "清华大学"]),
        ("一只cat，跑！", "zh", ["一只", "cat", "跑"]),
        ("， 。", "zh", []),
    ],
)
def test_words(text: str, language: str, expected: list[str]) -> None:
    assert words.split_words(text, language) == expected
    assert words.count_words(text, language) == len(expected)


def test_own_dictionary_leaves_no_cache_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    words._cutter.cache_clear()
    words.count_words("图片", "zh")
    assert list(tmp_path.iterdir()) == []


def test_words_are_those_of_jieba() -> None:
    """In texts of both languages, with signs that jieba keeps with letters, and numbers."""
    draw = random.Random(11)
    jieba_words = load_jieba()
    chunks = [
        *"一只红色的苹果和猫在上了麒麟々〇ー",
        *["网易杭研大厦", "乒乓球拍卖完了", "T恤", "卡拉OK", "c++", "C#", "AT&T", "iPhone15", "3.14%", "1.2.3", "a_b"],
        *["isn't", "well-known", "café", "猫です", ".", "-", "_", "#", "%", "，", "……", "👍🏽", "é", "①"],
        *" \n\u3000",
    ]
    for _ in range(3000):
        text = "".join(draw.choices(chunks, k=draw.randint(1, 9)))
        expected = [word for word in jieba_words.lcut(text) if any(map(str.isalnum, word))]
        assert words.split_words(text, "zh") == expected, text
