"""Mean product of local rows with constant mixtures of the group's rows: what soft targets add to a cross-entropy.

    value = mean_i q_i . (sum_j D_ij k_j)        D: constant shares, such as hard targets less soft ones

The cross-entropy of targets T with the softmax of S is that of hard targets P plus sum_j (P_ij - T_ij) S_ij, and S is
linear in either side. So soft targets cost the exact tiled operator of ITC, and this.

The value is linear in q and in k, and every row weighs the same, so gradients are final as soon as a tile of D exists.
Forward computes value and gradients in one pass over the tiles, each made once, and sums the gradients of other ranks'
rows back to them. Backward only multiplies by the upstream gradient.

Letters: n local queries · m local keys · K keys of the group · g ranks of the group · E feature dim.

Cost per rank: sent (g - 1) m E elements (the keys are gathered by the caller); 2 matrix products of n x K x E beside
what makes D; memory K E and a few tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from m2_encoder.distributed.collectives import scatter_sums
from m2_encoder.objectives.derivatives import refuse_forward_mode, refuse_second_derivative

_TILE_BYTES = 16 << 20
"""Size of one matrix of a tile; D needs a few."""

Shares: TypeAlias = Callable[[slice], Tensor]
"""Rows of D for some local queries, (t, K); constant."""


class Alignment(NamedTuple):
    """Value of `mean_alignment`."""

    mean: Tensor  # value, (), differentiable by queries and keys
    mixed: Tensor  # sum_j D_ij k_j, (n, E), detached; its products with the queries are the rows' values


def mean_alignment(
    queries: Tensor, keys: Tensor, all_keys: Tensor, shares: Shares, *, group: dist.ProcessGroup | None
) -> Alignment:
    """Mean over the local queries. Its gradient, averaged over all ranks, is that of the mean of all ranks' values.

    Args:
        queries: (n, E), fp32 or fp64.
        keys: local ones, (m, E), which get the gradient.
        all_keys: of the group in the order of its ranks, (K, E), constant; m on each rank.
        shares: D; called once for each tile, in order.
        group: ranks that call this together, and weigh its value equally; None for this rank alone.
    """
    refuse_forward_mode("this loss", queries, keys)
    mean, mixed = _MeanAlignment.apply(queries, keys, all_keys, shares, group)
    return Alignment(mean, mixed)


class _MeanAlignment(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, all_keys: Tensor, shares: Shares, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        rows, wants_keys = len(queries), ctx.needs_input_grad[1]
        mixed = torch.empty_like(queries)
        of_keys = torch.zeros_like(all_keys) if wants_keys else None
        size = max(1, _TILE_BYTES // (queries.element_size() * len(all_keys)))
        for start in range(0, rows, size):
            some = slice(start, min(start + size, rows))
            tile = shares(some)
            torch.mm(tile, all_keys, out=mixed[some])
            if of_keys is not None:
                of_keys.addmm_(tile.t(), queries[some], alpha=1 / rows)
        if of_keys is not None and group is not None:
            of_keys = scatter_sums(of_keys, group)
        ctx.save_for_backward(mixed, of_keys)
        ctx.mark_non_differentiable(mixed)
        return (queries * mixed).sum() / rows, mixed

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("this loss")
        mixed, of_keys = ctx.saved_tensors
        of_queries = mixed * (upstream[0] / len(mixed)) if ctx.needs_input_grad[0] else None
        return of_queries, None if of_keys is None else of_keys * upstream[0], None, None, None
