from __future__ import annotations

import sys
from typing import Any

import pytest

from m2_encoder.errors import UserError
from m2_encoder.tokenizers import words


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
    words._segmenter.cache_clear()
    words.count_words("图片", "zh")
    assert list(tmp_path.iterdir()) == []


def test_missing_jieba_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(UserError, match="pip install jieba"):
        words.load_jieba()
