"""White space and invisible characters of captions."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2_encoder.tokenizers.spaces import normalise_spaces, space_rules


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("a cat", "a cat"),
        ("  a \t\r\n cat ", "a cat"),
        ("一只\u3000猫  在 ， 家", "一只猫在，家"),
        ("红色  T恤 XL 码", "红色 T恤 XL 码"),
        ("\ufeffa\u00a0c\u200bat\u2060", "a cat"),
        ("soft\u00adhyphen", "softhyphen"),
        ("\u202ba cat\u202c \u2067", "a cat"),
        ("a\u0085cat\x00", "a cat"),
        ("葛\U000e0100城", "葛城"),
        ("क\u200dष", "कष"),
        ("👩\u200d🚀 🏳\ufe0f\u200d🌈 👩🏽\u200d🚀", "👩\u200d🚀 🏳\ufe0f\u200d🌈 👩🏽\u200d🚀"),
        ("❤\ufe0f\u200d🔥", "❤\ufe0f\u200d🔥"),
        ("🏴\U000e0067\U000e0062\U000e007f", "🏴\U000e0067\U000e0062\U000e007f"),
        ("👩\u200d", "👩"),
        ("\u200b\ufeff", ""),
        ("", ""),
    ],
)
def test_texts(text: str, clean: str) -> None:
    assert normalise_spaces(text) == clean


@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from(" \t\u3000\u200b\u200d\u00ad👩🚀a猫")), max_size=20))
def test_any_text(text: str) -> None:
    clean = normalise_spaces(text)
    assert "  " not in clean
    assert clean == clean.strip()
    assert not any(character.isspace() and character != " " for character in clean)
    visible = [c for c in text if unicodedata.category(c)[0] in "NPS" or (c.isalpha() and c.isascii())]
    assert [c for c in clean if c in set(visible)] == visible


@given(st.text(st.sampled_from("a 一，\t\u3000\u200b\u200d👩🚀\ufe0f\x1c\x85\x00\U000e0100"), max_size=12))
def test_rules_for_other_engines_are_the_same(text: str) -> None:
    tidied = text
    for pattern, replacement in space_rules():
        tidied = re.sub(pattern, replacement, tidied)
    assert tidied == normalise_spaces(text)
