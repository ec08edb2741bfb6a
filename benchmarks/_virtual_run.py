"""The start of a run over shards that do not exist, as a process of its own: `python _virtual_run.py SHARDS SAMPLES`.

It prints one line of JSON: seconds of each step between the configuration and the place of the first batch's samples,
and peak memory. Only measuring the shards themselves is left out, which waits for their disks.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import numpy as np

from m2_encoder.data.order.manifest import Manifest, SourceSpec, make_source
from m2_encoder.data.order.manifest_record import read_record
from m2_encoder.data.order.plan import PositionPlan
from m2_encoder.data.shards.paths import list_shards

BATCH = 8192


def main() -> None:
    shards, samples = (int(argument) for argument in sys.argv[1:])
    result: dict[str, Any] = {"imports_mb": _peak_mb()}
    rng = np.random.default_rng(0)
    counts = rng.integers(samples * 9 // 10, samples * 11 // 10 + 1, shards)
    sizes, layouts = (rng.integers(0, 2**bits, shards) for bits in (29, 32))

    def lap(step: str) -> None:
        nonlocal start
        result[f"{step}_s"] = time.perf_counter() - start
        start = time.perf_counter()

    began = start = time.perf_counter()
    spec = SourceSpec("pairs", f"/data/pairs/{{000000..{shards - 1:06d}}}.tar")
    names = list_shards(spec.shards)
    lap("names")
    manifest = Manifest([make_source(spec, names, counts.tolist(), sizes.tolist(), layouts=layouts.tolist())])
    lap("manifest")
    manifest.fingerprint()
    lap("fingerprint")
    record = manifest.record()
    lap("record")
    plan = PositionPlan(manifest, seed=0, lanes=64, window=65_536)
    places = [plan.locate(position) for position in range(BATCH)]
    lap("first_batch")
    result["total_s"] = time.perf_counter() - began
    result["peak_mb"] = _peak_mb()
    for position in range(BATCH * 1000, BATCH * 1001):
        plan.locate(position)
    lap("later_batch")
    assert len({(place.shard, place.number) for place in places}) == BATCH, "a sample came twice"
    assert len(read_record(record)["pairs"]["shards"]) == shards, "the record lost shards"
    result["record_mb"] = len(record) / 1e6
    print(json.dumps(result))


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
