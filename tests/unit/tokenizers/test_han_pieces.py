"""Pieces with Chinese characters, by which texts are told apart."""

from __future__ import annotations

from typing import Any

import pytest

from m2_encoder.data.samples.language import detect_language
from m2_encoder.tokenizers.han_pieces import mark_han_pieces
from tests.support.training import make_tokenizer


def test_texts_are_told_apart_as_by_their_characters() -> None:
    tokenizer = make_tokenizer()
    marked = mark_han_pieces(tokenizer)
    assert marked.shape == (tokenizer.vocab_size,)
    for text in ("一只猫", "a cat", "红 apple", "", "2 + 2", "☂", "Ünder", "龙", "<|endoftext|>", "，。"):
        assert bool(marked[tokenizer(text).ids].any()) == (detect_language(text) == "zh"), text


@pytest.mark.parametrize("character", ["䀀", "一", "鿿"])
def test_characters_in_bytes(character: str) -> None:
    class Bytes:
        vocab_size = 256

        def pieces(self, ids: range) -> list[str]:
            return [f"<0x{index:02X}>" for index in ids]

    tokenizer: Any = Bytes()
    marked = mark_han_pieces(tokenizer)
    assert marked[list(character.encode())].sum() == 1
    assert marked[list("aé😀あ！☂й한".encode())].sum() == 0
