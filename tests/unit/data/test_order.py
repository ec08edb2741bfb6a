"""The order of samples: epochs, ranks, world sizes, randomness."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2_encoder.data.order import SampleOrder, rank_positions
from m2_encoder.errors import UserError

SEEDS = st.integers(0, 2**63)


@given(num_samples=st.integers(1, 300), seed=SEEDS, epoch=st.integers(0, 50))
def test_an_epoch_holds_each_sample_once(num_samples: int, seed: int, epoch: int) -> None:
    order = SampleOrder(num_samples, seed)
    start = epoch * num_samples
    assert sorted(order.index(p) for p in range(start, start + num_samples)) == list(range(num_samples))


@given(seed=SEEDS)
def test_epochs_and_seeds_are_shuffled_differently(seed: int) -> None:
    def epoch(order: SampleOrder, number: int) -> list[int]:
        return [order.index(p) for p in range(number * 100, (number + 1) * 100)]

    order = SampleOrder(100, seed)
    shuffles = [epoch(order, 0), epoch(order, 1), epoch(SampleOrder(100, seed + 1), 0), list(range(100))]
    assert len({tuple(shuffle) for shuffle in shuffles}) == 4


@given(num_samples=st.integers(1, 60), seed=SEEDS, positions=st.lists(st.integers(0, 2000), max_size=30))
def test_positions_can_be_visited_in_any_order(num_samples: int, seed: int, positions: list[int]) -> None:
    # An unsorted visit goes back and forth over more epochs than the permutation cache holds.
    direct = {p: SampleOrder(num_samples, seed).index(p) for p in sorted(positions)}
    assert [SampleOrder(num_samples, seed).index(p) for p in positions] == [direct[p] for p in positions]


@given(seed=SEEDS, position=st.integers(0, 10**12), other=st.integers(0, 10**12))
def test_randomness_depends_on_seed_and_position_alone(seed: int, position: int, other: int) -> None:
    draws = SampleOrder(17, seed).rng(position).integers(2**63, size=4)
    disturbed = SampleOrder(90_000, seed)
    disturbed.rng(other).random()
    np.testing.assert_array_equal(disturbed.rng(position).integers(2**63, size=4), draws)
    if other != position:
        assert (SampleOrder(17, seed).rng(other).integers(2**63, size=4) != draws).any()
    assert (SampleOrder(17, seed + 1).rng(position).integers(2**63, size=4) != draws).any()


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


@given(num_samples=st.integers(1, 40), seed=SEEDS, worlds=st.permutations([1, 2, 3, 4, 6, 12]))
def test_global_batches_do_not_depend_on_the_number_of_ranks(num_samples: int, seed: int, worlds: list[int]) -> None:
    order = SampleOrder(num_samples, seed)

    def global_batches(world_size: int) -> list[list[int]]:
        ranks = [
            list(rank_positions(start=12, stop=60, global_batch_size=12, rank=rank, world_size=world_size))
            for rank in range(world_size)
        ]
        return [
            [order.index(p) for p in chain.from_iterable(zip(*parts, strict=True))]
            for parts in zip(*ranks, strict=True)
        ]

    assert global_batches(worlds[0]) == global_batches(worlds[1])


@pytest.mark.parametrize(("num_samples", "seed", "message"), [(0, 1, "num_samples=0"), (5, -1, "seed=-1")])
def test_impossible_orders_are_named(num_samples: int, seed: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SampleOrder(num_samples, seed)
