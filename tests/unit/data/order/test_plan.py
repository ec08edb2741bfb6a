"""Positions to samples: shares, epochs, windows, segments; any layout of ranks and workers sees the same."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2_encoder.data.loading.loader import rank_positions
from m2_encoder.data.order.keyed_random import KeyedPermutation, mix
from m2_encoder.data.order.manifest import Manifest, Source, SourceSpec, make_source
from m2_encoder.data.order.mixture import BLOCK, Mixture
from m2_encoder.data.order.plan import PositionPlan, Segment
from m2_encoder.errors import UserError

COUNTS = st.lists(st.integers(1, 30), min_size=1, max_size=8)
SEEDS = st.integers(0, 2**70)


def source(name: str, counts: Sequence[int], weight: float | None = None, **limits: int) -> Source:
    spec = SourceSpec(name=name, shards="unused", weight=weight, **limits)
    return make_source(spec, [f"{name}/{i}.tar" for i in range(len(counts))], counts, [1] * len(counts))


@st.composite
def plans(draw: st.DrawFn) -> PositionPlan:
    lanes = draw(st.sampled_from([1, 2, 4]))
    counts = draw(st.lists(COUNTS.filter(lambda c: sum(c) >= 4), min_size=1, max_size=4))
    weights = draw(st.lists(st.floats(0.01, 10), min_size=len(counts), max_size=len(counts)))
    sources = [source(str(i), c, w) for i, (c, w) in enumerate(zip(counts, weights, strict=True))]
    return PositionPlan(Manifest(sources), seed=draw(SEEDS), lanes=lanes, window=draw(st.integers(1, 50)))


@settings(max_examples=40)
@given(plan=plans(), epochs=st.integers(1, 3))
def test_every_sample_of_a_source_once_per_its_epoch(plan: PositionPlan, epochs: int) -> None:
    # Lanes reach the end of an epoch at different positions, so read until all are beyond it.
    size = max(s.samples / w for s, w in zip(plan.manifest.sources, plan.manifest.weights, strict=True))
    stop = int((epochs * size + 2) * sum(plan.manifest.weights)) + plan.lanes * 2 * BLOCK
    seen = Counter(plan.locate(position) for position in range(min(stop, 60_000)))
    for number, own in enumerate(plan.manifest.sources):
        for epoch in range(epochs):
            found = {(p.shard, p.number): n for p, n in seen.items() if p.source == number and p.epoch == epoch}
            assert set(found.values()) <= {1}
            if stop <= 60_000:
                assert set(found) == {(s, i) for s, count in enumerate(own.counts) for i in range(count)}


@settings(max_examples=40)
@given(
    counts=COUNTS.filter(lambda c: sum(c) >= 16),
    lanes=st.integers(1, 16),
    window=st.integers(1, 50),
    epoch=st.integers(0, 40),
)
def test_a_source_alone_comes_once_in_every_round_of_its_size(
    counts: list[int], lanes: int, window: int, epoch: int
) -> None:
    """Also where the lanes do not divide its samples."""
    plan = PositionPlan(Manifest([source("a", counts)]), seed=1, lanes=lanes, window=window)
    places = [plan.locate(epoch * sum(counts) + i) for i in range(sum(counts))]
    assert {place.epoch for place in places} == {epoch}
    assert len({place[2:] for place in places}) == sum(counts)


def test_a_source_may_be_drawn_to_its_last_sample_and_no_further() -> None:
    plan = PositionPlan(Manifest([source("a", [100], max_epochs=2)]), seed=0, lanes=64, window=50)
    plan.check_repeats(200)
    with pytest.raises(UserError, match="draws 201 samples of its 100, more than max_epochs=2"):
        plan.check_repeats(201)


@settings(max_examples=30)
@given(plan=plans(), block=st.integers(0, 3000))
def test_quotas_hold_in_every_block_of_every_lane(plan: PositionPlan, block: int) -> None:
    shares = np.array(plan.manifest.weights) / sum(plan.manifest.weights) * BLOCK
    for lane in range(plan.lanes):
        own = (lane + plan.lanes * (block * BLOCK + step) for step in range(BLOCK))
        counts = Counter(plan.locate(position).source for position in own)
        for number, share in enumerate(shares):
            assert abs(counts[number] - share) < 1 + 1e-3, "parts per million of rounding come on top"


@settings(max_examples=60)
@given(weights=st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=12), blocks=st.integers(0, 10_000))
def test_shares_are_exact_in_the_long_run(weights: list[float], blocks: int) -> None:
    mixture = Mixture(weights)
    before = mixture.before(blocks)
    assert before.sum() == blocks * BLOCK
    period = mixture.before(mixture.period)
    shares = period / mixture.period
    assert (np.abs(before - shares * blocks) < 1).all()
    assert (np.abs(mixture.quotas(blocks) - shares) < 1).all()
    np.testing.assert_array_equal(before + mixture.quotas(blocks), mixture.before(blocks + 1))
    np.testing.assert_allclose(shares / BLOCK, np.array(weights) / sum(weights), atol=len(weights) * 1.01e-6)


def test_plain_shares_are_kept_without_rounding() -> None:
    assert Mixture([1, 2]).before(3).tolist() == [1000, 2000]
    assert Mixture([0.3, 0.7]).period == 1
    assert Mixture([0.1, 0, 0.0001]).quotas(7)[1] == 0


@settings(max_examples=40)
@given(
    plan=plans(),
    per_rank=st.integers(1, 5),
    worlds=st.permutations([1, 2, 3, 4, 6]),
    cut=st.integers(0, 6),
)
def test_global_batches_do_not_depend_on_ranks_or_on_where_a_run_was_cut(
    plan: PositionPlan, per_rank: int, worlds: list[int], cut: int
) -> None:
    size, steps = 12 * per_rank, 6

    def read(world: int, start: int, stop: int) -> list[list[object]]:
        # A fresh plan for every rank, as in another process.
        ranks = []
        for rank in range(world):
            own = PositionPlan(plan.manifest, seed=plan.seed, lanes=plan.lanes, window=plan.window)
            batches = rank_positions(
                start=start * size, stop=stop * size, global_batch_size=size, rank=rank, world_size=world
            )
            ranks.append([[own.locate(p) for p in batch] for batch in batches])
        return [list(chain.from_iterable(zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)]

    whole = read(1, 0, steps)
    assert read(worlds[0], 0, cut) + read(worlds[1], cut, steps) == whole


@settings(max_examples=40)
@given(plan=plans(), position=st.integers(0, 5000), attempt=st.integers(1, 20))
def test_replacements_are_samples_of_the_same_source(plan: PositionPlan, position: int, attempt: int) -> None:
    place, spare = plan.locate(position), plan.locate(position, attempt=attempt)
    assert (spare.source, spare.epoch) == (place.source, place.epoch)
    assert 0 <= spare.number < plan.manifest.sources[spare.source].counts[spare.shard]
    assert spare == PositionPlan(plan.manifest, seed=plan.seed, lanes=plan.lanes, window=plan.window).locate(
        position, attempt=attempt
    )
    if attempt <= 4:
        assert spare.shard in plan.shards(plan.stretch(position))


@settings(max_examples=30)
@given(plan=plans(), lane=st.integers(0, 3))
def test_windows_follow_each_other_and_name_the_shards_that_are_read(plan: PositionPlan, lane: int) -> None:
    lane %= plan.lanes
    last = {}
    for position in range(lane, 400 * plan.lanes, plan.lanes):
        stretch, place = plan.stretch(position), plan.locate(position)
        assert (stretch.source, stretch.lane, stretch.epoch) == (place.source, lane, place.epoch)
        assert place.shard in plan.shards(stretch)
        before = last.get(place.source, stretch)
        assert stretch in (before, plan.following(before))
        last[place.source] = stretch


def test_a_batch_comes_from_many_shards_but_a_lane_from_few() -> None:
    counts = [10_000] * 2000
    plan = PositionPlan(Manifest([source("a", counts)]), seed=1, lanes=64, window=40_000)
    batch = [plan.locate(5 * 4096 + 32 * i).shard for i in range(128)]  # of one of 32 ranks
    assert len(set(batch)) >= 8
    wide = [plan.locate(5 * 128 + i).shard for i in range(128)]
    assert len(set(wide)) >= 64
    lane = {plan.locate(64 * step).shard for step in range(30_000)}
    assert len(lane) <= 6


def test_lanes_of_ranks_are_apart() -> None:
    plan = PositionPlan(Manifest([source("a", [50] * 64)]), seed=1, lanes=8, window=100)
    shards = [{plan.locate(p).shard for p in range(rank, 1600, 4)} for rank in range(4)]
    for i, mine in enumerate(shards):
        for theirs in shards[i + 1 :]:
            assert len(mine & theirs) <= 4, "only shards on the border of two lanes are shared"


def test_six_hundred_thousand_shards_take_seconds() -> None:
    counts = [10_000] * 600_000
    own = source("a", counts)
    started = time.process_time()
    plan = PositionPlan(Manifest([own]), seed=0, lanes=1024, window=40_000)
    places = [plan.locate(position) for position in range(0, 10**9, 10**6 + 1)]
    assert time.process_time() - started < 3
    assert len({p.shard for p in places}) > 900


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    def order(seed: int, epoch: int) -> tuple[tuple[int, int], ...]:
        plan = PositionPlan(Manifest([source("a", [25] * 4)]), seed=seed, lanes=1, window=200)
        places = [plan.locate(p) for p in range(epoch * 100, epoch * 100 + 100)]
        return tuple((p.shard, p.number) for p in places)

    assert len({order(0, 0), order(0, 1), order(1, 0)}) == 3
    assert sorted(order(0, 1)) == sorted(order(1, 0)) == [(s, i) for s in range(4) for i in range(25)]


@settings(max_examples=25)
@given(seed=SEEDS, cuts=st.lists(st.integers(1, 4000), min_size=1, max_size=3), lanes=st.sampled_from([1, 2, 8]))
def test_a_new_segment_goes_on_where_its_sources_were(seed: int, cuts: list[int], lanes: int) -> None:
    # One source stays, another is added, a third one changes; the first one must not notice.
    sources = {"a": source("a", [40, 30, 50], 1.0), "b": source("b", [60], 2.0)}
    history: list[Segment] = []
    seen: list[tuple[int, int, int]] = []
    position = 0
    for number, length in enumerate([*cuts, 3000]):
        sources["b"] = source("b", [60 + number], 2.0 + number)
        if number == 1:
            sources["c"] = source("c", [33], 0.5)
        plan = PositionPlan(
            Manifest(list(sources.values())), seed=seed, lanes=lanes, window=20, history=history, start=position
        )
        for p in range(position, position + length):
            place = plan.locate(p)
            if place.source == 0:
                seen.append(place[1:])
        history = list(plan.segments)
        position += length
    times = Counter(seen)
    assert max(times.values()) == 1, "a sample came twice in an epoch"
    epochs = max(epoch for epoch, _, _ in seen)
    whole = [epoch for epoch in range(epochs) if epoch < min(e for e, _, _ in seen[-lanes * 4 :])]
    for epoch in whole:
        assert sum(e == epoch for e, _, _ in seen) == 120, "a sample was lost"


def test_counts_say_what_was_drawn() -> None:
    manifest = Manifest([source("a", [40, 30], 1.0), source("b", [60], 2.0)])
    first = PositionPlan(manifest, seed=3, lanes=2, window=20)
    again = Manifest([source("a", [40, 30], 5.0), source("b", [60], 2.0)])
    plan = PositionPlan(again, seed=3, lanes=2, window=20, history=first.segments, start=700)
    drawn = np.zeros((2, 2), int)
    for position in range(1300):
        drawn[position % 2, (first if position < 700 else plan).locate(position).source] += 1
    np.testing.assert_array_equal(plan.counts(1300), drawn)


def test_a_mixture_that_cannot_be_met_is_refused_with_numbers() -> None:
    manifest = Manifest([source("a", [500], 1.0), source("b", [100], 1.0, max_epochs=2)])
    plan = PositionPlan(manifest, seed=0, lanes=4, window=50)
    plan.check_repeats(340)
    with pytest.raises(UserError, match=r"data.sources.b: the run draws 532 samples of its 100.*max_epochs=2"):
        plan.check_repeats(1000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lanes": 64}, r"data.lanes=64 exceeds the samples of a source \(a has 50\); for example data.lanes=32"),
        ({"lanes": 0}, "data.lanes=0 must be 1 or more"),
        ({"window": 0}, "data.window=0"),
        ({"seed": -1}, "seed=-1 must be 0 or more"),
    ],
)
def test_impossible_plans_are_named(change: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PositionPlan(Manifest([source("a", [50])]), **{"seed": 0, "lanes": 1, "window": 10, **change})


@given(size=st.integers(1, 500), key=st.integers(0, 2**64 - 1))
def test_keyed_permutations_are_permutations(size: int, key: int) -> None:
    permutation = KeyedPermutation(size, key)
    table = permutation.table().tolist()
    assert sorted(table) == list(range(size))
    assert [permutation(i) for i in range(size)] == table


def test_keyed_permutations_are_uniform() -> None:
    found = Counter(tuple(KeyedPermutation(4, mix(i)).table().tolist()) for i in range(12_000))
    assert len(found) == 24
    assert all(abs(count - 500) < 6 * 500**0.5 for count in found.values())
    assert len({mix(1, 2), mix(2, 1), mix(1), mix(1, 0), mix(1 << 64, 2)}) == 5
