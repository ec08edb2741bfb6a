"""Counts what a process sends through torch's process groups, in two ways that know nothing of each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

COLLECTIVES = (
    "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object", "all_gather_single",
    "all_reduce", "all_reduce_coalesced", "all_to_all", "all_to_all_single", "barrier", "batch_isend_irecv",
    "broadcast", "broadcast_object_list", "gather", "gather_object", "irecv", "isend", "monitored_barrier", "recv",
    "reduce", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor", "scatter", "send",
)  # fmt: skip
_ITEM_SIZES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "long": 8}


class Traffic(NamedTuple):
    """Of one span of a program, in order.

    Attributes:
        called: name and bytes sent of each collective of `torch.distributed` that was called; by a ring, a rank sends
            each other rank's share of the result once.
        seen: the same by the profiler, of every operation of a process group, whoever asked for it.
    """

    called: list[tuple[str, int]]
    seen: list[tuple[str, int]]

    @property
    def bytes_sent(self) -> int:
        """Sum over the calls."""
        return sum(size for _, size in self.called)


def measure(body: Callable[[], Any], *, ranks: int) -> tuple[Any, Traffic]:
    """Run `body` and count; `ranks` is the size of the group whose gathers are priced."""
    called: list[tuple[str, int]] = []

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sizes = [t.numel() * t.element_size() for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            called.append((name, _sent(max(sizes, default=0), ranks)))
            return original(*args, **kwargs)

        return call

    patched = {name: counting(name, getattr(dist, name)) for name in COLLECTIVES if hasattr(dist, name)}
    with mock.patch.multiple(dist, **patched), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        result = body()
    seen = []
    for event in record.profiler.kineto_results.events():
        if event.name().startswith("c10d::"):
            sizes = [
                int(torch.tensor(shape).prod()) * _ITEM_SIZES.get(dtype, 0)
                for shape, dtype in zip(event.shapes(), event.dtypes(), strict=True)
                if shape
            ]
            seen.append((event.name().removeprefix("c10d::"), _sent(max(sizes, default=0), ranks)))
    return result, Traffic(called, seen)


def _sent(gathered_bytes: int, ranks: int) -> int:
    assert gathered_bytes % ranks == 0, f"{gathered_bytes} bytes are no {ranks} equal parts"
    return gathered_bytes // ranks * (ranks - 1)
