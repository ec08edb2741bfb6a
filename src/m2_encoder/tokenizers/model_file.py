"""Reading SentencePiece files."""

from __future__ import annotations

import os
from pathlib import Path

import sentencepiece

from m2_encoder.errors import UserError


def read_model(path_or_bytes: str | os.PathLike[str] | bytes) -> tuple[bytes, str]:
    """Content of a SentencePiece file, and how messages call it."""
    if isinstance(path_or_bytes, bytes):
        content, name = path_or_bytes, "tokenizer bytes"
    elif isinstance(path_or_bytes, str | os.PathLike):
        name = os.fspath(path_or_bytes)
        try:
            content = Path(name).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a null character in the name
            raise UserError(f"{name}: cannot read the tokenizer file: {error}") from error
    else:
        raise UserError(
            f"the tokenizer must be the path or the bytes of a SentencePiece .model, got {type(path_or_bytes).__name__}"
        )
    if not content:
        raise UserError(f"{name}: the tokenizer file is empty; copy the SentencePiece .model again")
    return content, name


def build_processor(content: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    """A processor on the content of a SentencePiece file."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        raise UserError(
            f"{name}: not a SentencePiece model, or a damaged one ({len(content):,} bytes); copy it again"
        ) from error
    return processor


def find_piece(processor: sentencepiece.SentencePieceProcessor, piece: str) -> int | None:
    """Id of a piece, None where the model has no such piece (SentencePiece answers with the unknown id)."""
    index = int(processor.piece_to_id(piece))
    return index if processor.id_to_piece(index) == piece else None
