"""Cross-entropy against a large token table, one tile of logits at a time.

With a vocabulary of 115,244, the fp32 logits of 64 captions of 52 tokens take 1.5 GB, and their gradient as much again.
So logits exist for a few rows at a time, and backward computes them again; a single tile is kept for backward.

Letters: M predicted tokens · V vocabulary · D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from m2_encoder.errors import UserError

_TILE_BYTES = 64 << 20
"""Size of the logits that exist at a time."""


def token_cross_entropy(states: Tensor, table: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """loss_m = logsumexp_v(s_m . w_v + b_v) - (s_m . w_t + b_t), t the target of m.

    Args:
        states: s, (M, D), floating.
        table: w, (V, D).
        bias: b, (V,).
        targets: t, (M,) int64.

    Returns:
        Losses, (M,), fp32 (fp64 for fp64), differentiable by states, table and bias; and whether the target is the
        argmax of the scores, (M,) bool. Products are in the dtype of autocast, sums in fp32 at least. There is no
        second derivative: `create_graph=True` is refused with a `UserError`.
    """
    dtype = states.dtype
    device = states.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    losses, hits = _TokenCrossEntropy.apply(states.to(dtype), table, bias, targets)
    return losses, hits


class _TokenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, table: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(states.dtype, torch.float32)
        losses = states.new_empty(len(states), dtype=wide)
        logsumexp = torch.empty_like(losses)
        hits = torch.empty(len(states), dtype=torch.bool, device=states.device)
        weight = table.to(states.dtype)
        tiles = _tiles(len(states), len(table))
        kept: tuple[Tensor, ...] = ()
        for start, stop in tiles:
            logits = _logits(states[start:stop], weight, bias, wide)
            highest, first = logits.max(dim=1)
            own = logits.gather(1, targets[start:stop, None]).squeeze(1)
            # In place: the tile becomes exp(logits - highest), which backward can use again.
            logsumexp[start:stop] = logits.sub_(highest[:, None]).exp_().sum(dim=1).log_().add_(highest)
            losses[start:stop] = logsumexp[start:stop] - own
            # `own >= highest` is False for NaN, which max returns as the highest.
            hits[start:stop] = (first == targets[start:stop]) & (own >= highest)
            if len(tiles) == 1:
                kept = logits, highest
        # Saved as an activation, so that checkpointing drops and recomputes it.
        ctx.save_for_backward(states, table, bias, targets, logsumexp, *kept)
        ctx.is_spent = not kept
        ctx.mark_non_differentiable(hits)
        ctx.set_materialize_grads(False)
        return losses, hits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph: torch would take this gradient for a constant
            raise UserError("the loss of tokens has no second derivative; call backward with create_graph=False")
        states, table, bias, targets, logsumexp, *kept = ctx.saved_tensors
        upstream = gradients[0]
        if upstream is None:
            return None, None, None, None
        wide = logsumexp.dtype
        weight = table.to(states.dtype)
        wants_states, wants_table, wants_bias = ctx.needs_input_grad[:3]
        of_states = torch.empty_like(states) if wants_states else None
        of_table = torch.zeros_like(table, dtype=torch.promote_types(table.dtype, wide)) if wants_table else None
        of_bias = torch.zeros(bias.shape, dtype=wide, device=bias.device) if wants_bias else None
        for start, stop in _tiles(len(states), len(table)):
            if ctx.is_spent:
                tile = _logits(states[start:stop], weight, bias, wide)
                tile.sub_(logsumexp[start:stop, None]).exp_()
            else:
                tile, highest = kept[0].data, kept[1]  # of no version: a second backward is told that it is spent
                ctx.is_spent = True
                tile.mul_((highest - logsumexp).exp_()[:, None])
            tile[torch.arange(stop - start, device=tile.device), targets[start:stop]] -= 1
            tile.mul_(upstream[start:stop, None])
            if of_bias is not None:
                of_bias += tile.sum(dim=0)
            product = tile.to(states.dtype)
            if of_states is not None:
                of_states[start:stop] = product @ weight
            if of_table is not None:
                if of_table.dtype == product.dtype:
                    of_table.addmm_(product.t(), states[start:stop])
                else:
                    of_table += product.t() @ states[start:stop]
        return (
            of_states,
            None if of_table is None else of_table.to(table.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            None,
        )


def _logits(states: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast(states.device.type, enabled=False):
        return (states @ weight.t()).to(dtype).add_(bias.to(dtype))


def _tiles(rows: int, vocab_size: int) -> list[tuple[int, int]]:
    """Row ranges whose logits fit `_TILE_BYTES`."""
    size = max(1, _TILE_BYTES // (4 * vocab_size))
    return [(start, min(rows, start + size)) for start in range(0, rows, size)]
