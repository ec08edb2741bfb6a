"""Which pieces of a vocabulary hold Chinese characters, so that ids alone show whether a text is Chinese."""

from __future__ import annotations

import re
from typing import Final

import torch
from torch import Tensor

from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

_HAN: Final = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_HAN_BYTE: Final = re.compile(r"<0xE[4-9]>")
"""First byte of U+4000 to U+9FFF in UTF-8, where a vocabulary spells what it lacks in bytes; no other byte is that."""


def mark_han_pieces(tokenizer: SentencePieceTokenizer) -> Tensor:
    """1 for each piece that holds a unified ideograph, or is the first byte of one, else 0; (pieces,) fp32."""
    pieces = tokenizer.pieces(range(tokenizer.vocab_size))
    return torch.tensor([float(bool(_HAN.search(piece) or _HAN_BYTE.fullmatch(piece))) for piece in pieces])
