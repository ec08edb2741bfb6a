"""Whether a tokenizer is that of the weights, and how weights get another one.

Exports and checkpoints of ours hold their tokenizer, or at least its digest. The official release does not: there the
token table has a row for each piece, and special pieces have known ids.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from m2_encoder.checkpoints.exported import CONFIG_FILE, TOKENIZER_FILE
from m2_encoder.checkpoints.formats import file_kind, read_safetensors_metadata, read_torch
from m2_encoder.checkpoints.training_state import CHECKPOINT_FOLDER
from m2_encoder.checkpoints.weight_files import find_weights
from m2_encoder.errors import CheckpointError
from m2_encoder.tokenizers.han_pieces import mark_han_pieces
from m2_encoder.tokenizers.sentencepiece_tokenizer import OFFICIAL_VOCAB_SIZE, SentencePieceTokenizer

TOKEN_TABLE: Final = "text_embed.tokens.weight"
"""The one parameter with a row for each piece."""

HAN_PIECES: Final = "text_embed.han_pieces"
"""A number for each piece, of models with adapters for languages."""

CHECKPOINT_KEY: Final = "tokenizer"
"""Of a training checkpoint: `sha256`, and the SentencePiece file as `file`, (bytes,) uint8."""

DIGEST_METADATA_KEY: Final = "m2_encoder_tokenizer"
"""Of the safetensors file in an export."""

_OFFICIAL_IDS: Final = (50_002, 50_000, 50_003)  # [CLS], <|endoftext|>, [MASK]
_SPACE: Final = "▁"
_LOGGER = logging.getLogger(__name__)


class StoredTokenizer(NamedTuple):
    """The tokenizer that weights say they have."""

    sha256: str | None  # of its SentencePiece file; None if they do not say
    content: bytes | None  # that file, where it is at hand


def pack_tokenizer(content: bytes, sha256: str) -> dict[str, Any]:
    """The entry of a training checkpoint."""
    return {"sha256": sha256, "file": torch.frombuffer(bytearray(content), dtype=torch.uint8)}


def find_tokenizer(weights: str | os.PathLike[str]) -> StoredTokenizer:
    """The tokenizer of weights: in the checkpoint, in the export's folder, or in the export of the checkpoint's run.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    path = find_weights(weights)
    kind = file_kind(path)
    beside = path.parent if (path.parent / CONFIG_FILE).is_file() else None
    if kind == "zip":
        held = read_torch(path, mapped=path.suffix != ".safetensors")
        entry = held.get(CHECKPOINT_KEY) if isinstance(held, Mapping) else None
        if isinstance(entry, Mapping) and isinstance(entry.get("file"), Tensor):
            return StoredTokenizer(str(entry["sha256"]), entry["file"].numpy().tobytes())
        beside = path.parent.parent / "export" if path.parent.name == CHECKPOINT_FOLDER else beside
    digest = read_safetensors_metadata(path).get(DIGEST_METADATA_KEY) if kind == "safetensors" else None
    if beside is not None and (beside / TOKENIZER_FILE).is_file():
        content = (beside / TOKENIZER_FILE).read_bytes()
        own = hashlib.sha256(content).hexdigest()
        if digest in (None, own):
            return StoredTokenizer(own, content)
    return StoredTokenizer(digest, None)


def check_stored(sha256: str | None, tokenizer: SentencePieceTokenizer, *, weights: object) -> None:
    """Refuse a tokenizer that is not the one of a digest; without a digest nothing is known.

    Raises:
        CheckpointError: if it is another one.
    """
    if sha256 is not None and sha256 != tokenizer.digest:
        raise CheckpointError(_refuse(weights, tokenizer, f"theirs has the SHA-256 {sha256[:12]}…"))


def fit_vocabulary(
    state: dict[str, Tensor],
    tokenizer: SentencePieceTokenizer,
    *,
    weights: str | os.PathLike[str],
    mapped: bool | str | os.PathLike[str] = False,
) -> None:
    """Check that weights and tokenizer belong together, or give the weights' token table the tokenizer's pieces.

    Args:
        state: parameters under our names; the token table is replaced if pieces are mapped.
        tokenizer: to use with the weights.
        weights: where they come from.
        mapped: False refuses another tokenizer than theirs; True maps rows by the text of pieces, from the tokenizer
            that the weights hold; a SentencePiece file maps from that one.

    Raises:
        CheckpointError: if the tokenizer is another one and pieces are not mapped, or the old pieces are not known.
    """
    table = state.get(TOKEN_TABLE)
    if table is None or table.dim() != 2:
        return  # left for the comparison of names and shapes to report
    stored = find_tokenizer(weights)
    if not mapped:
        _check(table.shape[0], stored, tokenizer, weights)
        return
    if mapped is True and stored.content is None:
        raise CheckpointError(f"{weights}: does not hold its tokenizer; give its file: map_tokenizer=sp.model")
    old = SentencePieceTokenizer(stored.content if mapped is True and stored.content is not None else mapped)  # type: ignore[arg-type]
    if mapped is not True:
        _check(table.shape[0], stored, old, weights)
    state[TOKEN_TABLE], kept = map_rows(table, old, tokenizer)
    if HAN_PIECES in state:
        state[HAN_PIECES] = mark_han_pieces(tokenizer)
    _LOGGER.warning(
        "%s: %s of %s pieces of the tokenizer keep their row of the token table, %s begin as the mean of the pieces "
        "that they split into",
        os.fspath(weights), f"{kept:,}", f"{tokenizer.vocab_size:,}", f"{tokenizer.vocab_size - kept:,}",
    )  # fmt: skip


def map_rows(table: Tensor, old: SentencePieceTokenizer, new: SentencePieceTokenizer) -> tuple[Tensor, int]:
    """A token table for another tokenizer, and how many of its pieces the old one has.

    A piece that the old one lacks becomes the mean of the old pieces of its text; one of which it knows nothing, the
    mean of all.

    Returns:
        (pieces of the new one, D) in the dtype of the table, and the number of rows that were kept.
    """
    ids = {piece: index for index, piece in reversed(list(enumerate(old.pieces(range(old.vocab_size)))))}
    anything = table[: old.vocab_size].float().mean(dim=0).to(table.dtype)
    rows, kept = [], 0
    for piece in new.pieces(range(new.vocab_size)):
        if piece in ids:
            rows.append(table[ids[piece]])
            kept += 1
            continue
        parts = [] if piece.startswith("<") and piece.endswith(">") else _split(piece, old)
        rows.append(table[parts].float().mean(dim=0).to(table.dtype) if parts else anything)
    return torch.stack(rows), kept


def _split(piece: str, old: SentencePieceTokenizer) -> list[int]:
    """Old ids of a piece's text, without what is unknown and the space that begins every text."""
    ids = [index for index in old.encode(piece.replace(_SPACE, " ")) if index != old.unknown_id]
    if not piece.startswith(_SPACE) and len(ids) > 1 and old.pieces(ids[:1]) == [_SPACE]:
        del ids[0]
    return ids


def _check(rows: int, stored: StoredTokenizer, tokenizer: SentencePieceTokenizer, weights: object) -> None:
    if stored.sha256 == tokenizer.digest:
        return
    if stored.content is not None and SentencePieceTokenizer(stored.content).cuts_like(tokenizer):
        return  # the same one in another file
    check_stored(stored.sha256, tokenizer, weights=weights)
    special = (tokenizer.cls_id, tokenizer.end_id, tokenizer.mask_id)
    if rows != tokenizer.vocab_size:
        raise CheckpointError(_refuse(weights, tokenizer, f"their token table has {rows:,} rows"))
    if rows == OFFICIAL_VOCAB_SIZE and special != _OFFICIAL_IDS:
        raise CheckpointError(_refuse(weights, tokenizer, "the official special pieces have other ids"))


def _refuse(weights: object, tokenizer: SentencePieceTokenizer, said: str) -> str:
    return (
        f"the tokenizer ({tokenizer.vocab_size:,} pieces, SHA-256 {tokenizer.digest[:12]}…) is not that of the weights "
        f"{str(weights)[-200:]}: {said}; give theirs, or map its pieces with map_tokenizer=true (m2-train: "
        "model.map_tokenizer=true)"
    )
