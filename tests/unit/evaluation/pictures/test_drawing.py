"""Text of pictures: full-width letters, and characters that the font lacks."""

from __future__ import annotations

from importlib.resources import files

import pytest
from PIL import ImageFont

from m2_encoder.evaluation.pictures.drawing import drawable, wrap_text

FONT = str(files("m2_encoder") / "assets" / "fonts" / "NotoSansSC-subset.ttf")


FULL_WIDTH = "ＡＢＣ１２３，！（ｔｅｓｔ）～￥％：；？＃＠＊［］｛｝｜＜＞"


def test_full_width_letters_are_in_the_font() -> None:
    assert drawable(FULL_WIDTH) == FULL_WIDTH
    assert drawable("螃蟹，榴莲") == "螃蟹，榴莲"


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("①㎏ﬁ½", "1kgfi½"),
        ("ǎ Ḁ ｶ", "a A ?"),
        ("a\u200b\ufeffb\u0301c", "abc"),
        ("two\nlines\tand\u3000more", "two lines and more"),
        ("❤\ufe0f 🦄 สวัส", "? ? ???"),
    ],
)
def test_characters_that_the_font_lacks_become_others(text: str, drawn: str) -> None:
    assert drawable(text) == drawn


def test_no_text_draws_an_empty_box() -> None:
    box = bytes(ImageFont.truetype(FONT, 24).getmask("\U000f0000"))
    font = ImageFont.truetype(FONT, 24)
    text = drawable("".join(map(chr, range(0x20, 0x3400))) + "🦄" + FULL_WIDTH + "龘靐齉繁體")
    assert not [character for character in set(text) if bytes(font.getmask(character)) == box]
    assert all(line == drawable(line) for line in wrap_text("🦄 ① " * 40, 12, 100, max_lines=3))
