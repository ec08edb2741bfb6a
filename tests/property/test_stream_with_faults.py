"""Any mixture with any share of bad samples, read by any ranks and workers, cut anywhere: batches full and the same."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2_encoder.data.images.decode import decode_image_uint8
from m2_encoder.data.images.tensor_transforms import TensorTrainTransform
from m2_encoder.data.loading.faults import SampleFault
from m2_encoder.data.loading.loader import rank_positions
from m2_encoder.data.loading.stream import Delivery, SampleStream
from m2_encoder.data.order.manifest import SourceSpec, build_manifest
from m2_encoder.data.order.plan import PositionPlan
from m2_encoder.data.samples.captions import CaptionSampler
from m2_encoder.data.shards.reader import ShardReader
from tests.support.shards import make_image, make_sample, write_tar

BATCH, STEPS, SIDE = 12, 8, 8

Members = list[tuple[str, bytes]]
_CAPTION = json.dumps({"caption": "a dog"}).encode()
DAMAGES: dict[str, Callable[[str], Members]] = {
    "undecodable_image": lambda key: [(f"{key}.png", make_image(1)[:40]), (f"{key}.json", _CAPTION)],
    "too_small": lambda key: [(f"{key}.png", make_image(1, side=2)), (f"{key}.json", _CAPTION)],
    "bad_json": lambda key: [(f"{key}.png", make_image(1)), (f"{key}.json", b"{")],
    "not_utf8": lambda key: [(f"{key}.png", make_image(1)), (f"{key}.txt", b"caf\xe9")],
    "wrong_type": lambda key: [(f"{key}.png", make_image(1)), (f"{key}.json", b'{"caption": 3}')],
    "missing_caption": lambda key: [(f"{key}.png", make_image(1)), (f"{key}.json", b"{}")],
    "missing_image": lambda key: [(f"{key}.json", _CAPTION)],  # told by headers: no part of the order
}


class Layout(NamedTuple):
    """Who reads: ranks, and workers of each."""

    world: int
    workers: int


LAYOUTS = st.builds(Layout, st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([1, 2, 3]))


@st.composite
def mixtures(draw: st.DrawFn) -> list[tuple[list[int], int, dict[int, str]]]:
    """For each source: samples of its shards, its weight, and the damage of some samples by number."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        counts = draw(st.lists(st.integers(2, 14), min_size=2, max_size=4))
        share = draw(st.floats(0, 0.4))
        numbers = draw(st.permutations(range(sum(counts))))[: int(share * sum(counts))]
        reasons = draw(st.lists(st.sampled_from(sorted(DAMAGES)), min_size=len(numbers), max_size=len(numbers)))
        found.append((counts, draw(st.integers(1, 5)), dict(zip(numbers, reasons, strict=True))))
    return found


def write(folder: Path, mixture: list[tuple[list[int], int, dict[int, str]]]) -> list[SourceSpec]:
    specs = []
    for number, (counts, weight, bad) in enumerate(mixture):
        first = 0
        for shard, count in enumerate(counts):
            members: Members = []
            for i in range(first, first + count):
                key = f"s{number}-{i:03d}"
                members += DAMAGES[bad[i]](key) if i in bad else make_sample(key, i)
            write_tar(folder / f"s{number}" / f"{shard}.tar", members)
            first += count
        specs.append(SourceSpec(f"s{number}", str(folder / f"s{number}"), weight=float(weight)))
    return specs


def deliver(
    make_stream: Callable[[], SampleStream], layout: Layout, start: int, stop: int
) -> dict[int, list[Delivery]]:
    """Global batches of some steps: each worker of each rank reads every so many-th batch with a stream of its own."""
    batches: dict[int, list[Delivery]] = {}
    for rank in range(layout.world):
        own = rank_positions(
            start=start * BATCH, stop=stop * BATCH, global_batch_size=BATCH, rank=rank, world_size=layout.world
        )
        streams = [make_stream() for _ in range(layout.workers)]
        for number, positions in enumerate(own):
            rows = list(streams[number % layout.workers].deliver(positions))
            batches.setdefault(start + number, [None] * BATCH)[rank :: layout.world] = rows  # type: ignore[list-item]
    return batches


def signature(delivery: Delivery) -> tuple[bytes, object, tuple[SampleFault, ...]]:
    sample = delivery.sample
    assert sample.image.shape == (3, SIDE, SIDE)
    assert sample.image.dtype == torch.uint8
    return sample.image.contiguous().numpy().tobytes(), sample._replace(image=None), delivery.faults


@settings(max_examples=25)
@given(
    mixture=mixtures(),
    seed=st.integers(0, 2**40),
    lanes=st.sampled_from([1, 2]),  # the smallest source has four samples, of which one may be no part of the order
    window=st.integers(4, 40),
    before=LAYOUTS,
    after=LAYOUTS,
    cut=st.integers(1, STEPS - 1),
)
def test_batches_are_full_and_the_same_whoever_reads_them(
    mixture: list[tuple[list[int], int, dict[int, str]]],
    seed: int,
    lanes: int,
    window: int,
    before: Layout,
    after: Layout,
    cut: int,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        specs = write(Path(folder), mixture)

        def make_stream() -> SampleStream:
            reader = ShardReader()
            manifest = build_manifest(specs, measure=reader.measure)
            return SampleStream(
                PositionPlan(manifest, seed=seed, lanes=lanes, window=window),
                reader=reader,
                captions=CaptionSampler(language_weights={"en": 1, "zh": 1}, role_weights={"original": 1}),
                decode=decode_image_uint8,
                transform=TensorTrainTransform(SIDE, scale=(0.6, 1.0)),
            )

        whole = deliver(make_stream, Layout(1, 1), 0, STEPS)
        parts = {**deliver(make_stream, before, 0, cut), **deliver(make_stream, after, cut, STEPS)}
        plan = make_stream()._plan
    bad = {f"s{n}-{i:03d}": reason for n, (_, _, own) in enumerate(mixture) for i, reason in own.items()}
    in_headers = {key for key, reason in bad.items() if reason == "missing_image"}
    assert sorted(parts) == sorted(whole) == list(range(STEPS))
    for step, batch in whole.items():
        assert list(map(signature, parts[step])) == list(map(signature, batch))
        for row, delivery in enumerate(batch):
            sample = delivery.sample
            source = plan.manifest.sources[plan.locate(step * BATCH + row).source].name
            assert sample.key not in bad
            assert sample.source == source == sample.key.partition("-")[0]
            for fault in delivery.faults:
                assert fault.key is not None
                assert fault.key not in in_headers
                assert (fault.source, fault.reason) == (source, bad[fault.key])
