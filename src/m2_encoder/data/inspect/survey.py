"""Inspect some shards of a source, for `m2-data check`, `m2-data stats` and the start of training."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from m2_encoder.data.inspect.inspection import (
    CAPTION_ROW,
    SAMPLE_ROW,
    InspectionOptions,
    ShardInspection,
    ShardTask,
    inspect_shard,
)
from m2_encoder.data.shards.paths import is_remote
from m2_encoder.data.shards.remote import RemoteShards
from m2_encoder.data.worker_pool import map_in_processes


class Survey(NamedTuple):
    """All inspected samples of a source."""

    shards: tuple[ShardInspection, ...]  # each inspected one, in order
    num_shards: int  # of the source
    num_bytes: int  # of all its shards, as far as they are there
    missing: tuple[str, ...]  # local shards that are not there, also of those that were not looked at
    is_whole: bool  # whether every sample was inspected
    rows: npt.NDArray[np.void]  # usable inspected samples, `SAMPLE_ROW`
    captions: npt.NDArray[np.void]  # theirs, `CAPTION_ROW`, with rows counted over all shards
    options: InspectionOptions
    remote: RemoteShards | None = None  # local copies of remote shards

    def usable_of_indexed(self) -> float:
        """Share of usable ones among samples usable by their headers; damaged images are a share of decoded ones."""
        inspected = sum(item.inspected for item in self.shards)
        decoded, damaged = (sum(getattr(item, name) for item in self.shards) for name in ("decoded", "damaged"))
        readable = (len(self.rows) + damaged) / inspected if inspected else 0.0
        return readable * (1 - damaged / decoded) if decoded else readable


def survey_source(
    shards: Sequence[str | Path],
    options: InspectionOptions,
    *,
    max_shards: int | None = 8,
    workers: int = 0,
    remote: RemoteShards | None = None,
    report: Callable[[ShardInspection], None] = lambda _: None,
) -> Survey:
    """Inspect the shards of a source, or some of them, evenly spread.

    `max_shards=None` takes all, `workers=0` works in this process, and `report` is called with each shard, in order.

    Raises:
        UserError: if jieba is missing for words, the tokenizer is invalid, or remote shards have no folder for copies.
    """
    count = len(shards) if max_shards is None else min(max_shards, len(shards))
    chosen = [shards[(2 * i + 1) * len(shards) // (2 * count)] for i in range(count)]
    tasks = (ShardTask(str(path), options, remote) for path in chosen)
    found: list[ShardInspection] = []
    for inspection in map_in_processes(inspect_shard, tasks, workers=workers, preload=inspect_shard.__module__):
        found.append(inspection)
        report(inspection)
    first_rows = np.cumsum([0, *(len(item.rows) for item in found)])
    captions = [item.captions.copy() for item in found]
    for part, first in zip(captions, first_rows, strict=False):
        part["row"] += first
    num_bytes, missing = _measure_files(shards, found)
    return Survey(
        shards=tuple(found),
        num_shards=len(shards),
        num_bytes=num_bytes,
        missing=missing,
        is_whole=count == len(shards) and all(item.inspected == item.indexed for item in found),
        rows=np.concatenate([np.empty(0, SAMPLE_ROW), *(item.rows for item in found)]),
        captions=np.concatenate([np.empty(0, CAPTION_ROW), *captions]),
        options=options,
        remote=remote,
    )


def _measure_files(shards: Sequence[str | Path], found: Sequence[ShardInspection]) -> tuple[int, tuple[str, ...]]:
    """Bytes of all tars, and those that are missing; remote ones that were not fetched count like those that were."""
    local = [str(shard).removeprefix("file://") for shard in shards if not is_remote(str(shard))]
    sizes = [os.path.getsize(path) if os.path.isfile(path) else None for path in local]
    fetched = [item.num_bytes for item in found if is_remote(item.path)]
    mean = sum(fetched) / len(fetched) if fetched else 0
    total = sum(size or 0 for size in sizes) + round(mean * (len(shards) - len(local)))
    return total, tuple(path for path, size in zip(local, sizes, strict=True) if size is None)
