"""The order of samples: what it costs at 600,000 shards, and how well it shuffles.

Cost: a fresh process starts a run over 600,000 shards of about 10,000 samples that exist as names and numbers only:
expanding the names, the manifest, its fingerprint and record for checkpoints, the plan, and the places of the first
8,192 samples. Left out is the look at the shards themselves, which waits for disks.

Shuffling: local batches of 128 samples from shards of 10,000, by our plan (64 lanes, windows of 65,536 samples) and by
a simulated shuffle buffer over tars read one after the other, as open_clip has it (5,000 samples, of which 1,000 are
waited for; webdataset's algorithm). In our plan a rank meets more lanes the fewer ranks there are.

- distinct shards: how many shards a local batch comes from.
- same-shard pairs: of all pairs within a local batch, those from one shard.
- with a neighbour: samples of a local batch whose neighbour in the tar is in it, too; crawled neighbours are alike.

Figures: `plan_s`, `plan_peak_mb` of the fresh process (`plan_imports_mb` of it before it began), `record_mb` of a
checkpoint, `locate_us` per sample; `shards_buffer`, `shards_8_ranks`, ...: distinct shards.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from _common import Report, parse_arguments
from _virtual_run import BATCH

from m2_encoder.data.order.manifest import Manifest, SourceSpec, make_source
from m2_encoder.data.order.plan import PositionPlan

SHARDS, SAMPLES = 600_000, 10_000
LOCAL_BATCH = 128
BUFFER, INITIAL = 5000, 1000
RANKS = (1, 8, 64, 512)
BATCHES, QUICK_BATCHES = 300, 60

Sample = tuple[int, int]
"""Number of the shard, number in the shard."""


def measure_start(report: Report, *, rounds: int) -> None:
    """Rows and figures of the start over virtual shards."""
    command = [sys.executable, str(Path(__file__).with_name("_virtual_run.py")), str(SHARDS), str(SAMPLES)]
    found = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(rounds)
    ]
    medians = {key: statistics.median(each[key] for each in found) for key in found[0]}
    for key in medians:
        if key.endswith("_s"):
            report.add(
                f"{SHARDS:,} shards: {key.removesuffix('_s').replace('_', ' ')}",
                seconds=round(medians[key], 3),
                max_s=round(max(each[key] for each in found), 3),
                rounds=rounds,
            )
    report.figures["plan_s"] = medians["total_s"]
    report.figures["plan_peak_mb"] = medians["peak_mb"]
    report.figures["plan_imports_mb"] = medians["imports_mb"]
    report.figures["record_mb"] = medians["record_mb"]
    report.figures["locate_us"] = 1e6 * medians["later_batch_s"] / BATCH


def planned_batches(ranks: int, count: int) -> Iterator[list[Sample]]:
    """Local batches of the first rank, from all over an epoch."""
    shards = 20_000
    counts = [SAMPLES] * shards
    spec = SourceSpec("pairs", "unused")
    manifest = Manifest([make_source(spec, [f"{i:06d}.tar" for i in range(shards)], counts, [0] * shards)])
    plan = PositionPlan(manifest, seed=0, lanes=64, window=65_536)
    global_batch = LOCAL_BATCH * ranks
    steps = shards * SAMPLES // global_batch
    for step in np.random.default_rng(0).integers(0, steps, count).tolist():
        places = [plan.locate(step * global_batch + i * ranks) for i in range(LOCAL_BATCH)]
        yield [(place.shard, place.number) for place in places]


def buffered_batches(count: int) -> Iterator[list[Sample]]:
    """Local batches of a worker that streams shuffled shards through a buffer, once that is full."""
    rng = random.Random(0)
    stream = ((shard, number) for shard in rng.sample(range(1_000_000), 1000) for number in range(SAMPLES))
    buffer: list[Sample] = []
    batch: list[Sample] = []
    made = 0
    for sample in stream:
        buffer.append(sample)
        if len(buffer) < BUFFER:
            buffer.append(next(stream))
        if len(buffer) >= INITIAL:
            chosen = rng.randrange(len(buffer))
            buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
            batch.append(buffer.pop())
        if len(batch) == LOCAL_BATCH:
            made += 1
            if made > 100:  # by then the buffer is full
                yield batch
            batch = []
        if made == 100 + count:
            return


def add_quality(report: Report, what: str, figure: str, batches: Sequence[Sequence[Sample]]) -> None:
    """A row and a figure about some local batches."""
    distinct = statistics.mean(len({shard for shard, _ in batch}) for batch in batches)
    pairs = LOCAL_BATCH * (LOCAL_BATCH - 1)
    same = statistics.mean(
        sum(n * (n - 1) for n in Counter(shard for shard, _ in batch).values()) / pairs for batch in batches
    )
    beside = statistics.mean(
        sum((s, n - 1) in found or (s, n + 1) in found for s, n in batch) / LOCAL_BATCH
        for batch in batches
        if (found := set(batch))
    )
    report.add(
        what,
        distinct_shards=round(distinct, 1),
        same_shard_pairs_percent=round(100 * same, 2),
        with_a_neighbour_percent=round(100 * beside, 2),
        batches=len(batches),
    )
    report.figures[figure] = distinct


def main() -> None:
    arguments = parse_arguments(__doc__)
    report = Report("The order of samples", distributions=("numpy", "webdataset"))
    measure_start(report, rounds=1 if arguments.quick else 5)
    count = QUICK_BATCHES if arguments.quick else BATCHES
    buffered = list(buffered_batches(count))
    add_quality(report, f"buffer of {BUFFER:,} over tars", "shards_buffer", buffered)
    for ranks in RANKS:
        batches = list(planned_batches(ranks, count))
        add_quality(report, f"plan, {ranks} rank{'s' * (ranks > 1)}", f"shards_{ranks}_ranks", batches)
    report.finish(json_path=arguments.json)


if __name__ == "__main__":
    main()
