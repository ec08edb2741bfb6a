"""Batch accumulation: a rank's rows are encoded in pieces (micro-batches) for one loss over all of them.

The features of all pieces enter one loss and one backward, so the gradient is that of the whole batch. With
recomputation, each piece is a segment of torch's non-reentrant checkpointing: backward encodes it again with the same
random state, and only one piece at a time holds activations (as GradCache does, arXiv:2101.06983).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from m2_encoder.distributed.averaging import refuse_outside_wrapper
from m2_encoder.errors import UserError

Piece = TypeVar("Piece")
Encoded = TypeVar("Encoded")
Model = TypeVar("Model", bound=nn.Module)


def encode_pieces(
    encode: Callable[[Piece], tuple[Tensor, ...]], pieces: Sequence[Piece], *, recompute: bool = True
) -> tuple[Tensor, ...]:
    """Encode pieces one after the other, and concatenate their tensors.

    Call it in the forward of the module that DistributedDataParallel wraps: outside of it, gradients of pieces that
    are recomputed would not be averaged.

    Args:
        encode: returns tensors with one row per row of the piece. With FSDP2 it must be a registered forward method.
        pieces: at least one; the same number on every rank.
        recompute: keep no activations; encode again in backward. A single piece would gain nothing: it keeps them.

    Raises:
        UserError: for pieces that are recomputed outside of that forward.
    """
    encoded = _encode_each(encode, pieces, recompute=recompute)
    return tuple(torch.cat(parts) for parts in zip(*encoded, strict=True)) if len(encoded) > 1 else encoded[0]


def in_pieces(model: Model, micro_batches: int, *, recompute: bool = True) -> Model:
    """Let the forward of a model encode its rows in pieces, for one loss over all of them; wrap the result by DDP.

    Parameters, names, and all methods but forward stay as they are. Without gradients forward takes all rows at once.
    Another call sets another number.

    Args:
        model: a module whose forward maps rows to rows. All its tensor arguments are cut along the first dimension,
            other arguments and numbers, (), are given to every piece. Of what it returns, tensors with rows are
            concatenated, and the rest is that of the first piece, such as a scale. Layers that mix rows, such as batch
            normalisation, see a piece at a time, twice where it is recomputed.
        micro_batches: number of pieces, k; it must divide the rows.
        recompute: encode a piece again in backward, with the same random numbers, instead of keeping its activations.

    Returns:
        The model itself.

    Raises:
        UserError: for a model that is wrapped already, or a number below 1; in forward, for rows that cannot be cut, or
            for pieces that are recomputed outside of the forward of DistributedDataParallel.
    """
    if type(micro_batches) is not int or micro_batches < 1:
        raise UserError("must be a whole number, 1 or more", key="micro_batches", value=micro_batches)
    if isinstance(model, DistributedDataParallel):
        raise UserError(
            "in_pieces takes the model inside: its pieces would not pass DistributedDataParallel, and gradients not be "
            "averaged; use DistributedDataParallel(in_pieces(model, k))"
        )

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if micro_batches == 1 or not torch.is_grad_enabled():
            return self._encode_piece(*args, **kwargs)
        pieces = _cut((args, kwargs), micro_batches)
        return _join(_encode_each(lambda piece: self._encode_piece(*piece[0], **piece[1]), pieces, recompute=recompute))

    whole = getattr(model, "_encode_piece", model.forward)
    signature = inspect.signature(whole)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    # Trainers read the names of arguments here.
    forward.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])  # type: ignore[attr-defined]
    model._encode_piece = whole  # type: ignore[assignment]
    model.forward = MethodType(forward, model)
    return model


def _encode_each(encode: Callable[[Piece], Encoded], pieces: Sequence[Piece], *, recompute: bool) -> list[Encoded]:
    if not (recompute and len(pieces) > 1 and torch.is_grad_enabled()):
        return [encode(piece) for piece in pieces]
    encoded = []
    for piece in pieces:
        encoded.append(checkpoint(encode, piece, use_reentrant=False))
        if len(encoded) == 1:
            refuse_outside_wrapper([part for part in tree_flatten(encoded)[0] if isinstance(part, Tensor)])
    return encoded


def _cut(arguments: Any, count: int) -> list[Any]:
    parts, form = tree_flatten(arguments)
    rows = [len(part) for part in parts if _has_rows(part)]
    if not rows or any(number % count or not number for number in rows):
        given = f"tensors of {', '.join(map(str, rows))} rows" if rows else "no tensor with rows"
        raise UserError(
            f"in_pieces(model, {count}) cannot cut {given} into {count} equal pieces; use batches of a multiple of "
            f"{count} rows (drop_last=True in the loader), and give what has no rows otherwise than as a tensor"
        )
    cut = [part.split(len(part) // count) if _has_rows(part) else (part,) * count for part in parts]
    return [tree_unflatten(list(piece), form) for piece in zip(*cut, strict=True)]


def _join(encoded: list[Any]) -> Any:
    flat = [tree_flatten(each) for each in encoded]
    columns = zip(*(parts for parts, _ in flat), strict=True)
    return tree_unflatten(
        [torch.cat(column) if _has_rows(column[0]) else column[0] for column in columns],
        flat[0][1],
    )


def _has_rows(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dim() > 0
