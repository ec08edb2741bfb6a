"""Positions of ranks; what stands at them is tested with the plan."""

from __future__ import annotations

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from m2_encoder.data.loading.sample_order import rank_positions


@given(
    per_rank=st.integers(1, 6),
    world_size=st.sampled_from([1, 2, 3, 4, 8]),
    first_batch=st.integers(0, 9),
    batches=st.integers(0, 6),
)
def test_ranks_partition_every_global_batch(per_rank: int, world_size: int, first_batch: int, batches: int) -> None:
    size = per_rank * world_size
    start, stop = first_batch * size, (first_batch + batches) * size
    by_rank = [
        list(rank_positions(start=start, stop=stop, global_batch_size=size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert all(len(own) == batches for own in by_rank)
    for t, parts in enumerate(zip(*by_rank, strict=True)):
        assert all(len(part) == per_rank for part in parts)
        # The interleaving is part of the promise: batch t of rank r is t*B + r, t*B + r + R, ...
        interleaved = list(chain.from_iterable(zip(*parts, strict=True)))
        assert interleaved == list(range(start + t * size, start + (t + 1) * size))
