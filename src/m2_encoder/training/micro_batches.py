"""Batch accumulation: encode a rank's rows in pieces, then take one loss over all of them.

The gradient is that of the whole batch, because the features of all pieces meet in one loss and one backward pass
follows. With recomputation only one piece keeps its activations: every piece is a segment of torch's non-reentrant
checkpointing, which encodes it again when backward needs it, with the random state of the first time, so that dropout
and stochastic depth repeat (GradCache, arXiv:2101.06983, in autograd's own terms).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from m2_encoder.errors import UserError
from m2_encoder.types import ImageTextBatch, TextTokens

Piece = TypeVar("Piece")


def split_rows(batch: ImageTextBatch, micro_batches: int) -> list[ImageTextBatch]:
    """Split a rank's rows into equal pieces, in order.

    Args:
        batch: B images with k captions each.
        micro_batches: number of pieces.

    Returns:
        Pieces of B / pieces images with their captions.

    Raises:
        UserError: if the rows cannot be divided.
    """
    rows = batch.images.shape[0]
    if rows % micro_batches:
        raise UserError(
            f"strategy.micro_batches={micro_batches} must divide the {rows} rows of a rank; "
            "change it or data.global_batch_size"
        )
    if micro_batches == 1:
        return [batch]
    size = rows // micro_batches
    return [batch.rows(slice(first, first + size)) for first in range(0, rows, size)]


def split_batch(batch: ImageTextBatch, micro_batches: int) -> tuple[list[Tensor], list[TextTokens]]:
    """Images and texts of `split_rows`."""
    pieces = split_rows(batch, micro_batches)
    return [piece.images for piece in pieces], [piece.text for piece in pieces]


def encode_pieces(
    encode: Callable[[Piece], tuple[Tensor, ...]], pieces: Sequence[Piece], *, recompute: bool
) -> tuple[Tensor, ...]:
    """Encode pieces one after the other.

    Args:
        encode: gives tensors with one row per row of the piece. With FSDP2 it must be a registered forward method.
        pieces: at least one; the same number on every rank.
        recompute: keep no activations; encode again in backward. One piece alone would gain nothing and is kept.

    Returns:
        What `encode` gives, concatenated over the pieces.
    """
    replays = recompute and len(pieces) > 1 and torch.is_grad_enabled()
    encoded = [checkpoint(encode, piece, use_reentrant=False) if replays else encode(piece) for piece in pieces]
    return tuple(torch.cat(parts) for parts in zip(*encoded, strict=True)) if len(encoded) > 1 else encoded[0]
