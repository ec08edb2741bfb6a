"""Damage to files of tensors, and hostile ones."""

from __future__ import annotations

import io
import json
import os
import struct
from pathlib import Path
from typing import Any

import sentencepiece


class Attack:
    """Unpickling this would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def flip(path: Path, where: float) -> None:
    """The lowest bit of one byte, at a share of the file, which keeps no other name."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 1
    path.unlink()
    path.write_bytes(content)


def cut(path: Path, share: float = 0.5) -> None:
    """Keep the beginning of a file, which keeps no other name."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: int(len(content) * share)])


def hostile_safetensors(header: bytes, data: bytes = b"", size: int | None = None) -> bytes:
    """A file with any header, of a length that may be a lie."""
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def safetensors_entry(**changes: Any) -> bytes:
    """The header of one tensor."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    return json.dumps({"logit_scale": entry}).encode()


def train_other_tokenizer(*, size: int) -> bytes:
    """A SentencePiece model that no weights were trained with."""
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red cat", "a blue catfish", "the red fish", "一只猫", "红色的鱼"] * 9),
        model_writer=content,
        vocab_size=size,
        hard_vocab_limit=False,
        user_defined_symbols=["[CLS]", "[MASK]", "<|endoftext|>", "[UNK]", "redcat"],
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    return content.getvalue()
