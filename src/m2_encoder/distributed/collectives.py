"""Collectives of rows.

The differentiable gather replaces `torch.distributed.nn.all_gather`, whose backward fails on gloo sub-groups that do
not start at rank 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = rows.new_empty((dist.get_world_size(group) * rows.shape[0], *rows.shape[1:]))
        _all_gather(gathered, rows.detach().contiguous(), group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        own = grad.new_empty((grad.shape[0] // dist.get_world_size(ctx.group), *grad.shape[1:]))
        _reduce_scatter(own, grad.contiguous(), ctx.group)
        return own, None


def gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Rows of every rank, in group-rank order, with gradients: (B, ...), the same shape on every rank, to (G * B, ...).

    In backward each rank receives the *sum* over the group of the gradients of its rows.
    """
    gathered: Tensor = _GatherRows.apply(rows, group)
    return gathered


def gather_rows_without_grad(rows: Tensor, group: dist.ProcessGroup, *, counts: Sequence[int]) -> tuple[Tensor, ...]:
    """Rows of every rank of the group, without gradients, by one collective.

    Args:
        rows: (B, ...).
        group: process group that holds this rank.
        counts: rows of each rank of the group; all ranks send as many as the one with the most.

    Returns:
        One (count, ...) per rank, in group-rank order.
    """
    most = max(counts)
    padded = rows.detach()
    if rows.shape[0] < most:
        padded = torch.cat([padded, padded.new_zeros((most - rows.shape[0], *rows.shape[1:]))])
    gathered = rows.new_empty((len(counts) * most, *rows.shape[1:]))
    _all_gather(gathered, padded.contiguous(), group)
    return tuple(block[:count] for block, count in zip(gathered.split(most), counts, strict=True))


def gather_constant(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Rows of all ranks of the group, without gradients; each rank holds equally many."""
    if group is None:
        return rows.detach()
    return torch.cat(gather_rows_without_grad(rows, group, counts=[len(rows)] * dist.get_world_size(group)))


def exchange_counts(count: int, group: dist.ProcessGroup) -> list[int]:
    """A number of every rank of the group, in group-rank order.

    Goes through the key-value store of the process group: no collective and no synchronisation with the device, but
    three round trips to the store, about 0.5 ms on one machine.
    """
    store = distributed_c10d._get_process_group_store(group)  # type: ignore[attr-defined,unused-ignore]
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    call = store.add(f"m2_encoder/calls/{rank}", 1)
    store.set(f"m2_encoder/counts/{call}/{rank}", str(count))
    counts = store.multi_get([f"m2_encoder/counts/{call}/{other}" for other in range(ranks)])
    if call > 2:  # a rank that took part in the last call has left the one before
        store.delete_key(f"m2_encoder/counts/{call - 2}/{rank}")
    return [int(number) for number in counts]


def sum_over_group(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the ranks of the group, in place."""
    dist.all_reduce(values, group=group)
    return values


def max_over_group(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Maximum over the ranks of the group, in place."""
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return values


def scatter_sums(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the group of this rank's part of the rows, (G * B, ...) -> (B, ...)."""
    own = rows.new_empty((rows.shape[0] // dist.get_world_size(group), *rows.shape[1:]))
    _reduce_scatter(own, rows.contiguous(), group)
    return own


def _all_gather(gathered: Tensor, rows: Tensor, group: dist.ProcessGroup) -> None:
    with _names_of_all_releases():
        dist.all_gather_into_tensor(gathered, rows, group=group)


def _reduce_scatter(own: Tensor, rows: Tensor, group: dist.ProcessGroup) -> None:
    with _names_of_all_releases():
        dist.reduce_scatter_tensor(own, rows, op=dist.ReduceOp.SUM, group=group)


@contextmanager
def _names_of_all_releases() -> Iterator[None]:
    """Torch 2.14 renamed two collectives and warns, on every rank, about the only names that 2.10 has."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*deprecated.*")
        yield
