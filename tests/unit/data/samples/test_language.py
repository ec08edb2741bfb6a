"""Languages of captions, by their names and by their scripts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2_encoder.data.samples.language import (
    describe_languages,
    detect_language,
    detect_script,
    language_of_column,
    read_language,
)

_NAMES = {
    "zh": "zh ZH zh-CN zh_TW zh-Hant zh_Hans zh-hant-hk cn CN chs CHT zho chi zho_Hans cmn yue 中文 汉语 繁體中文",
    "en": "en EN en-US en_gb eng ENG eng_Latn English english 英文 英语",
    "fr": "fr fr-FR FR",
    "ja": "ja ja_JP",
}


@pytest.mark.parametrize(
    ("name", "language"), [(name, code) for code, names in _NAMES.items() for name in names.split()]
)
def test_names(name: str, language: str) -> None:
    assert read_language(name) == language
    assert read_language(f" {name}\n") == language


@pytest.mark.parametrize(
    ("name", "language"),
    [
        ("Chinese (Simplified)", "zh"),
        ("Traditional Chinese", "zh"),
        ("中文（简体）", "zh"),
        ("__label__zh", "zh"),
        ("American English", "en"),
        ("non-English", "non"),
        ("zh,fr", "zh,fr"),
        ("zh,en", None),
        ("zh-en", None),
        ("en_zh", None),
        ("Chinese/English", None),
        ("中英", None),
        ("en-CN", "en"),
        ("zh-cmn-Hans-CN", "zh"),
        ("N/A", None),
        ("", None),
        ("und", None),
        ("unknown", None),
        (None, None),
        ("x" * 900, "x" * 20),
    ],
)
def test_unusual_names(name: object, language: str | None) -> None:
    assert read_language(name) == language


@pytest.mark.parametrize(
    ("column", "language"),
    [
        *(
            (name, "zh")
            for name in ("zh", "zh-CN", "caption_zh", "caption_cn", "TEXT_ZH", "chinese_caption", "text.zh")
        ),
        *((name, "zh") for name in ("raw_caption_zh", "zh_short_caption", "sentence_zh", "中文描述", "中文_标题")),
        *((name, "en") for name in ("en", "English", "caption_en", "title en", "captionEn", "caption_en_1", "en-text")),
        *((name, "fr") for name in ("caption_fr", "fr_caption")),
        ("英文描述", "en"),
        *(
            (name, None)
            for name in ("fr", "caption", "caption_id", "text_len", "en_score", "caption_zh_url", "lang", "")
        ),
    ],
)
def test_names_of_columns(column: str, language: str | None) -> None:
    assert language_of_column(column) == language


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("cat", "en"),
        ("Übergrößenträger", "en"),
        ("un chat noir", "en"),  # nobody can tell French letters from English ones
        ("", "en"),
        ("12 + 3 🙂", "en"),
        ("ＡＢＣ", "en"),
        ("a 猫", "zh"),
        ("𠀀", "zh"),
        ("iPhone 15 手机壳", "zh"),
        ("鲜の每日坚果", "zh"),
        ("ㄅㄆㄇ", "zh"),
        ("ねこ", "ja"),
        ("ﾅｲｷ", "ja"),
        ("東京都庁舎の写真", "ja"),
        ("iPhone 15 Pro ケース", "ja"),
        ("¯\\_(ツ)_/¯", "en"),
        ("고양이 한 마리", "ko"),
        ("красный автобус", "cyrillic"),
        ("แมว", "thai"),
        ("قطة", "arabic"),
        ("Merc 600 котик", "cyrillic"),
        ("a кот and a dog", "en"),
    ],
)
def test_scripts(text: str, language: str) -> None:
    assert detect_language(text) == language


@given(st.text(max_size=30))
def test_any_text_has_a_script(text: str) -> None:
    assert detect_script(text).isascii()
    assert read_language(text) != ""
    language_of_column(text)


def test_many_languages_make_a_short_line() -> None:
    assert describe_languages({"de": 1, "fr": 1200}) == "1,200 captions in fr, 1 in de"
    assert describe_languages({"fr": 1}) == "1 caption in fr"
    assert len(describe_languages({"x" * 15 + str(i): 10**6 + i for i in range(5000)})) < 400
