"""Any mixture, share of damaged samples, layout and cut: the rest of a run is that of the uninterrupted one."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2_encoder.data.loading.loader import PositionLoader
from m2_encoder.data.loading.stages import StageClock
from m2_encoder.data.loading.stream import Delivery
from m2_encoder.data.order.manifest import Manifest, Source, SourceSpec, make_source
from m2_encoder.data.order.plan import PositionPlan, Segment
from m2_encoder.errors import UserError
from m2_encoder.types import ImageTextBatch, TextTokens
from tests.support.mixtures import make_mixture
from tests.support.resuming import digest_rows
from tests.support.shards import make_sample, write_tar

BATCH, STEPS = 12, 6
LAYOUTS = st.tuples(st.sampled_from([1, 2, 3, 4, 6]), st.sampled_from([0, 0, 0, 1, 2]))
"""Ranks, and loader processes of each."""


class Places:
    """The sample at a position is the name of its place in the plan."""

    def __init__(self, plan: PositionPlan) -> None:
        self._plan = plan
        self.clock = StageClock()

    def deliver(self, positions: Sequence[int]) -> Iterator[Delivery]:
        for place in map(self._plan.locate, positions):
            source = self._plan.manifest.sources[place.source]
            yield Delivery(f"{source.name} {place.epoch} {source.shards[place.shard]} {place.number}")


def to_batch(samples: list[str]) -> ImageTextBatch:
    nothing = torch.zeros(len(samples), 1)
    return ImageTextBatch(
        nothing, TextTokens(nothing, nothing.bool()), nothing, nothing, tuple(samples), ("",) * len(samples)
    )


def make(name: str, counts: Sequence[int], weight: float, **limits: Any) -> Source:
    shards = [f"/data/{name}/{i}.tar" for i in range(len(counts))]
    spec = SourceSpec(name=name, shards=shards, weight=weight, **limits)
    return make_source(spec, shards, counts, [100 * count for count in counts])


@st.composite
def sources_of(draw: st.DrawFn, names: Sequence[str] = ("a", "b", "c")) -> dict[str, Source]:
    """Some of the names, with shards and a weight each."""
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    counts = st.lists(st.integers(1, 12), min_size=1, max_size=4).filter(lambda c: sum(c) >= 4)
    return {name: make(name, draw(counts), draw(st.sampled_from([0.3, 1.0, 2.5]))) for name in chosen}


@st.composite
def mixtures_of(draw: st.DrawFn) -> list[dict[str, Source]]:
    """Mixtures that follow each other; sources come and go, and change their weights more often than their shards."""
    first = draw(sources_of())
    mixtures = [first]
    known = dict(first)
    for _ in range(draw(st.integers(1, 3))):
        known = {**draw(sources_of()), **known} if draw(st.booleans()) else {**known, **draw(sources_of())}
        names = draw(st.lists(st.sampled_from(sorted(known)), min_size=1, unique=True))
        weights = {name: draw(st.sampled_from([0.3, 1.0, 2.5])) for name in names}
        mixtures.append({name: make(name, known[name].counts.tolist(), weights[name]) for name in names})
    return mixtures


class Order(NamedTuple):
    """What else the order depends on."""

    seed: int
    lanes: int
    window: int


ORDERS = st.builds(Order, st.integers(0, 2**40), st.sampled_from([1, 2, 4]), st.integers(1, 40))


def open_loader(
    sources: Mapping[str, Source], order: Order, *, rank: int = 0, world: int = 1, workers: int = 0, **given: Any
) -> PositionLoader:
    manifest = Manifest(list(sources.values()))

    def plan(history: Sequence[Segment], start: int) -> PositionPlan:
        return PositionPlan(manifest, **order._asdict(), history=history, start=start)

    return PositionLoader(
        lambda history, start: Places(plan(history, start)),
        collate=to_batch,
        num_steps=STEPS,
        global_batch_size=BATCH,
        rank=rank,
        world_size=world,
        num_workers=workers,
        pin_memory=False,
        fingerprint={**order._asdict(), **manifest.fingerprint()},
        segment=plan((), 0).segments[-1].sources,
        record=manifest.record(),
        **{"new_segment": False, **given},
    )


def read(
    build: Callable[..., PositionLoader], layout: tuple[int, int], state: Any, steps: int, rows: Callable[..., Any]
) -> tuple[list[Any], Any]:
    """The next global batches on a layout, and the state after them, the same on all ranks; workers fetched more."""
    world, workers = layout
    parts, states = [], []
    for rank in range(world):
        loader = build(rank=rank, world=world, workers=workers)
        if state is not None:
            loader.load_state_dict(state)
        batches = iter(loader) if steps else iter(())
        parts.append([rows(next(batches)) for _ in range(steps)])
        states.append({key: value for key, value in loader.state_dict().items() if key != "manifest"})
        last = loader.state_dict()
        loader.close()
    assert all(each == states[0] for each in states)
    return [[row for group in zip(*parts_, strict=True) for row in group] for parts_ in zip(*parts, strict=True)], last


@settings(max_examples=6)
@given(sources=sources_of(), order=ORDERS, layouts=st.lists(LAYOUTS, min_size=2, max_size=3), data=st.data())
def test_states_hold_what_was_handed_over_on_any_layout(
    sources: dict[str, Source], order: Order, layouts: list[tuple[int, int]], data: st.DataObject
) -> None:
    whole = [list(batch.keys) for batch in open_loader(sources, order)]
    cuts = sorted(data.draw(st.integers(0, STEPS)) for _ in layouts[1:])
    state, found = None, []
    for layout, first, last in zip(layouts, [0, *cuts], [*cuts, STEPS], strict=True):
        # The order in which the configuration names its sources is nobody's business.
        turned = dict(reversed(sources.items()))

        def build(turned: dict[str, Source] = turned, **place: int) -> PositionLoader:
            return open_loader(turned, order, **place)

        batches, state = read(build, layout, state, last - first, lambda batch: batch.keys)
        assert state["position"] == last * BATCH
        found += batches
    assert found == whole


@settings(max_examples=6)
@given(
    mixtures=mixtures_of(),
    order=ORDERS,
    layouts=st.lists(LAYOUTS, min_size=4, max_size=4),
    data=st.data(),
)
def test_segments_go_on_where_each_source_was_on_any_layout(
    mixtures: list[dict[str, Source]], order: Order, layouts: list[tuple[int, int]], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.integers(0, STEPS)) for _ in mixtures[1:])
    ends = [*cuts, STEPS]

    def run(layouts: list[tuple[int, int]], again: int | None) -> list[list[str]]:
        state, found, first = None, [], 0
        for mixture, layout, last in zip(mixtures, layouts, ends, strict=False):

            def build(mixture: dict[str, Source] = mixture, **place: int) -> PositionLoader:
                return open_loader(mixture, order, new_segment=True, **place)

            batches, state = read(build, layout, state, last - first, lambda batch: batch.keys)
            found += batches
            first = last
            if again is not None and last < STEPS:  # a resume without a change, and without asking for a new segment
                batches, state = read(lambda m=mixture, **p: open_loader(m, order, **p), (1, again), state, 0, list)
        return found

    whole = run([(1, 0)] * len(mixtures), None)
    assert run(layouts, 2) == whole
    # A sample comes once per epoch of its source, whatever happens to others, while its source keeps its shards.
    contents: dict[str, set[str]] = {}
    for mixture in mixtures:
        for name, source in mixture.items():
            contents.setdefault(name, set()).add(source.digest())
    stable = {name for name, digests in contents.items() if len(digests) == 1}
    times = Counter(row for batch in whole for row in batch if row.split()[0] in stable)
    assert not times or max(times.values()) == 1


CHANGES: dict[str, Callable[[Source, int], tuple[Source | None, str]]] = {
    "weight": lambda s, n: (make("a", s.counts.tolist(), s.spec.weight * (1 + 1e-9)), "source a: weight"),
    "shard added": lambda s, n: (make("a", [*s.counts.tolist(), 3], s.spec.weight), r"1 shard\(s\) added"),
    "shard removed": lambda s, n: (
        make_source(s.spec, s.shards[:-1], s.counts[:-1], s.sizes[:-1]),
        r"1 shard\(s\) removed",
    ),
    "shard renamed": lambda s, n: (
        make_source(s.spec, [*s.shards[:n], "/data/a/other.tar", *s.shards[n + 1 :]], s.counts, s.sizes),
        r"other\.tar",
    ),
    "samples": lambda s, n: (
        make_source(s.spec, s.shards, [c + (i == n) for i, c in enumerate(s.counts)], s.sizes),
        rf"1 shard\(s\) changed \(/data/a/{'{n}'}\.tar",
    ),
    "bytes": lambda s, n: (
        make_source(s.spec, s.shards, s.counts, [c + (i == n) for i, c in enumerate(s.sizes)]),
        r"1 shard\(s\) changed",
    ),
    "order": lambda s, n: (make_source(s.spec, s.shards[::-1], s.counts[::-1], s.sizes[::-1]), "in another order"),
    "cap": lambda s, n: (make("a", s.counts.tolist(), s.spec.weight, max_samples=s.samples - 1), r"shard\(s\)"),
    "name": lambda s, n: (make("z", s.counts.tolist(), s.spec.weight), r"source a removed; source z added"),
    "source removed": lambda s, n: (None, "source a removed"),
}


@pytest.mark.parametrize("what", CHANGES)
@settings(max_examples=6)
@given(order=ORDERS, data=st.data(), steps=st.integers(0, 2))
def test_every_change_of_the_mixture_is_refused_and_named(
    what: str, order: Order, data: st.DataObject, steps: int
) -> None:
    counts = data.draw(st.lists(st.integers(2, 12), min_size=2, max_size=4, unique=True).filter(lambda c: c[0] >= 5))
    before = {"a": make("a", counts, 0.1), "b": make("b", [9], 2.0)}
    number = data.draw(st.integers(0, len(counts) - 1))
    changed, words = CHANGES[what](before["a"], number)
    now = {"b": before["b"], **({changed.name: changed} if changed else {})}
    if min(source.samples for source in now.values()) < order.lanes:
        return
    _, state = read(lambda **place: open_loader(before, order, **place), (1, 0), None, steps, list)
    with pytest.raises(UserError, match=f"another mixture of data .*{words.format(n=number)}.*data.new_segment=true"):
        open_loader(now, order).load_state_dict(state)
    with pytest.raises(UserError, match=r"with another run\.name$"):
        open_loader(now, order, new_segment=None).load_state_dict(state)
    open_loader(now, order, new_segment=True).load_state_dict(state)


@settings(max_examples=6)
@given(
    seed=st.integers(0, 2**31),
    damaged=st.sets(st.integers(0, 59), max_size=40),
    weights=st.tuples(st.sampled_from([1.0, 3.0]), st.sampled_from([1.0, 0.4])),
    layouts=st.tuples(LAYOUTS, LAYOUTS),
    cut=st.integers(1, STEPS - 1),
)
def test_real_shards_with_any_share_of_damaged_samples(
    seed: int, damaged: set[int], weights: tuple[float, float], layouts: tuple[tuple[int, int], ...], cut: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for source, first in (("a", 0), ("b", 40)):
            members = []
            for number in range(first, first + (40 if source == "a" else 20)):
                image, text = make_sample(f"{number:03d}", number)
                members += [(image[0], b"damaged"), text] if number in damaged else [image, text]
            write_tar(folder / source / "0.tar", members[:24])
            write_tar(folder / source / "1.tar", members[24:])
        sources = {s: {"shards": f"{folder}/{s}/*.tar", "weight": w} for s, w in zip("ab", weights, strict=True)}

        def build(*, rank: int, world: int, workers: int) -> PositionLoader:
            data = make_mixture(
                folder, seed=seed, sources=sources, num_workers=workers, global_batch_size=BATCH, max_steps=STEPS,
                max_bad_share=1.0,
            )  # fmt: skip
            values = {"global_rank": rank, "world_size": world, "accumulate_grad_batches": 1, "max_steps": STEPS}
            data.trainer = SimpleNamespace(**values, default_root_dir=str(folder / "run"))  # type: ignore[assignment]
            return data.train_dataloader()

        whole, _ = read(build, (1, 0), None, STEPS, digest_rows)
        first, state = read(build, layouts[0], None, cut, digest_rows)
        rest, _ = read(build, layouts[1], state, STEPS - cut, digest_rows)
        assert first + rest == whole
        used = {int(row.split("/")[1]) for batch in whole for row in batch}
        assert not used & damaged
        assert all(len(batch) == BATCH for batch in whole)
