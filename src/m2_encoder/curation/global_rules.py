"""The rules that compare rows with each other, whichever shards they are in, with bounded memory.

Each rule is two passes. *Spill*: every chunk of shards writes the keys of its surviving rows, split by key into
partitions. *Judge*: every partition, which holds all rows of its keys, decides which to reject, split by chunk again.
The next rule sees only the rows that are left. Of several equal rows the earliest place (shard, then row) stays, so
neither the order of tasks nor their number changes the result.

Letters: n rows · P partitions · C chunks · a *place* is shard number * 2**32 + row in the shard's table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from m2_encoder.curation.near import Nearest, band_keys, band_masks, earliest, find_earlier
from m2_encoder.curation.settings import CurationSettings
from m2_encoder.curation.tables import hash_words, read_bucket, read_table, write_buckets
from m2_encoder.data.order.keyed_random import scramble

Columns = dict[str, npt.NDArray[Any]]
Bools = npt.NDArray[np.bool_]

_SHARD_BITS = np.uint64(32)
_NEEDED = ("sample", "keep", "image_hash", "caption_hash", "perceptual_hash", "mean_color")


class GlobalRule(NamedTuple):
    """One rule.

    Attributes:
        reason: its word in reports, and the name of its stages.
        per_sample: whether it looks at images: a sample takes part once, and all its captions are rejected together.
        keys: takes a shard's surviving rows (a table of `_NEEDED`), settings, and the number of rows of the whole
            curation; gives both words of each key, `high` and `low`, and what else `judge` needs, (n,) each, or
            (T * n,) if rows have T keys.
        judge: takes all rows of some keys, with `place`; gives the rejected ones.
        is_on: whether settings ask for it.
        tables: how many keys a row has.
        rejects: False for a rule that only marks rows: they stay, and get `copied` instead of a reason.
    """

    reason: str
    per_sample: bool
    keys: Callable[[pa.Table, CurationSettings, int], Columns]
    judge: Callable[[Columns, CurationSettings], Nearest]
    is_on: Callable[[CurationSettings], bool]
    tables: Callable[[CurationSettings, int], int] = lambda _settings, _rows: 1
    rejects: bool = True


class Chunk(NamedTuple):
    """Neighbouring shards that are processed together."""

    number: int
    first: int  # number of its first shard
    paths: tuple[str, ...]  # the tables of its shards, in order


class Verdicts(NamedTuple):
    """Where the verdicts of a rule are."""

    rule: str
    paths: tuple[str, ...]  # a file per partition, with a bucket per chunk


class SpillTask(NamedTuple):
    """First pass over a chunk."""

    output: str  # a file with a bucket per partition
    rule: str
    chunk: Chunk
    earlier: tuple[Verdicts, ...]  # verdicts of the rules before, in order
    partitions: int  # P
    rows: int  # of the whole curation
    settings: CurationSettings


class JudgeTask(NamedTuple):
    """Second pass over a partition."""

    output: str  # a file with a bucket per chunk: `place` of rejected rows, and `first`, the place that they repeat
    rule: str
    spills: tuple[str, ...]
    partition: int  # which bucket of them
    chunk_starts: tuple[int, ...]  # number of the first shard of each chunk
    settings: CurationSettings


def spill(task: SpillTask) -> None:
    """Write the keys of a chunk's surviving rows, by partition."""
    rule = RULES[task.rule]
    parts: list[Columns] = []
    verdicts = [(RULES[earlier.rule], read_verdicts(earlier, task.chunk.number)) for earlier in task.earlier]
    for number, path in enumerate(task.chunk.paths, start=task.chunk.first):
        table = read_table(Path(path), _NEEDED)
        rows = np.flatnonzero(_survivors(table, number, verdicts))
        if rule.per_sample:
            rows = rows[np.unique(table.column("sample").to_numpy()[rows], return_index=True)[1]]
        columns = rule.keys(table.take(pa.array(rows)), task.settings, task.rows)
        parts.append(_add_places(columns, (np.uint64(number) << _SHARD_BITS) + rows.astype(np.uint64)))
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    partition = (whole["high"] % np.uint64(task.partitions)).astype(np.int64)
    write_buckets(Path(task.output), whole, partition, task.partitions)


def judge(task: JudgeTask) -> None:
    """Decide which rows of a partition are rejected."""
    columns = read_bucket([Path(path) for path in task.spills], task.partition)
    verdict = RULES[task.rule].judge(columns, task.settings)
    starts = np.array(task.chunk_starts, dtype=np.uint64)
    chunk = np.searchsorted(starts, verdict.place >> _SHARD_BITS, side="right") - 1
    write_buckets(Path(task.output), verdict._asdict(), chunk, len(starts))


def read_verdicts(verdicts: Verdicts, chunk: int) -> Nearest:
    """What a rule decided about a chunk: each place once, in order."""
    columns = read_bucket([Path(path) for path in verdicts.paths], chunk)
    return earliest(columns["place"], columns["first"])


def fallen(sample: npt.NDArray[Any], number: int, rule: GlobalRule, verdict: Nearest) -> tuple[Bools, Columns]:
    """Which rows of a shard a rule rejects; `verdict` is that of the shard's chunk, in the order of places.

    Returns:
        Mask, (n,), and for the rows in it `shard` and `row` of what they repeat, (n,), 0 elsewhere.
    """
    low, high = np.searchsorted(verdict.place, np.array([number, number + 1], dtype=np.uint64) << _SHARD_BITS)
    rows = (verdict.place[low:high] & np.uint64(0xFFFFFFFF)).astype(np.int64)
    first = np.zeros(len(sample), dtype=np.uint64)
    mask = np.zeros(len(sample), dtype=bool)
    mask[rows], first[rows] = True, verdict.first[low:high]
    if rule.per_sample:
        # All captions of the sample share the verdict; a shard's rows lie in the order of its samples.
        start = np.searchsorted(sample, sample[rows], side="left")
        stop = np.searchsorted(sample, sample[rows], side="right")
        for begin, end, place in zip(start, stop, verdict.first[low:high], strict=True):
            mask[begin:end], first[begin:end] = True, place
    shard, row = first >> _SHARD_BITS, first & np.uint64(0xFFFFFFFF)
    return mask, {"shard": shard.astype(np.uint32), "row": row.astype(np.uint32)}


def _survivors(table: pa.Table, number: int, verdicts: Sequence[tuple[GlobalRule, Nearest]]) -> Bools:
    keep = table.column("keep").to_numpy().copy()
    for rule, verdict in verdicts:
        if rule.rejects:
            keep &= ~fallen(table.column("sample").to_numpy(), number, rule, verdict)[0]
    return keep


def _add_places(columns: Columns, places: npt.NDArray[np.uint64]) -> Columns:
    """Places beside keys; a row without a key (see `_near_keys`) is left out by `rows`."""
    rows = columns.pop("rows", None)
    places = places if rows is None else places[rows]
    return {**columns, "place": np.tile(places, len(columns["high"]) // max(len(places), 1))}


def _hash_keys(column: str) -> Callable[[pa.Table, CurationSettings, int], Columns]:
    return lambda table, _settings, _rows: dict(zip(("high", "low"), hash_words(table.column(column)), strict=True))


def _pair_keys(table: pa.Table, _settings: CurationSettings, _rows: int) -> Columns:
    image, caption = hash_words(table.column("image_hash")), hash_words(table.column("caption_hash"))
    return {"high": scramble(image[0] ^ scramble(caption[0])), "low": scramble(image[1] ^ scramble(caption[1]))}


def _near_keys(table: pa.Table, settings: CurationSettings, rows: int) -> Columns:
    assert settings.near_images is not None
    hashes = table.column("perceptual_hash")
    known = np.flatnonzero(pc.is_valid(hashes).to_numpy())  # plain areas have no hash
    looks = hashes.take(pa.array(known)).to_numpy().astype(np.uint64)
    colors = table.column("mean_color").take(pa.array(known)).to_numpy().astype(np.uint64)
    keys = band_keys(looks, band_masks(settings.near_images, rows))
    columns = {"look": looks, "color": colors}
    if settings.duplicate_images != "drop":  # then there are copies, which must not count as near to each other
        columns["image"] = hash_words(table.column("image_hash").take(pa.array(known)))[1]
    tiled = {name: np.tile(values, len(keys)) for name, values in columns.items()}
    return {"rows": known, "high": keys.reshape(-1), **tiled}


def _judge_copies(columns: Columns, _settings: CurationSettings) -> Nearest:
    return _after_rank(columns, 1)


def _judge_repeats(columns: Columns, settings: CurationSettings) -> Nearest:
    assert settings.max_repeats is not None
    return _after_rank(columns, settings.max_repeats)


def _judge_near(columns: Columns, settings: CurationSettings) -> Nearest:
    assert settings.near_images is not None
    place = columns["place"]
    head = _first_copies(columns["image"], place) if "image" in columns else place
    found = find_earlier(
        columns["high"],
        columns["look"],
        columns["color"],
        head,
        distance=settings.near_images,
        tolerance=settings.near_color,
    )
    falls = np.isin(head, found.place)  # an image with all of its copies
    return earliest(place[falls], found.first[np.searchsorted(found.place, head[falls])])


def _first_copies(image: npt.NDArray[np.uint64], place: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """For each row, the earliest place of its image, (n,)."""
    order = np.lexsort((place, image))
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = image[order][1:] != image[order][:-1]
    head = np.empty_like(place)
    head[order] = place[order][starts][np.cumsum(starts) - 1] if len(order) else place
    return head


def _judge_shared(columns: Columns, _settings: CurationSettings) -> Nearest:
    """All rows of keys that several have, the first one included."""
    place, begin = _sort_by_key(columns)
    shared = np.bincount(begin, minlength=len(place))[begin] > 1
    return Nearest(place[shared], place[begin[shared]])


def _after_rank(columns: Columns, cap: int) -> Nearest:
    """Rows of a key beyond the first `cap`, in the order of places."""
    place, begin = _sort_by_key(columns)
    falls = np.arange(len(place)) - begin >= cap
    return Nearest(place[falls], place[begin[falls]])


def _sort_by_key(columns: Columns) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """Places in the order of keys, then of places, (n,); and for each where those of its key begin, (n,)."""
    order = np.lexsort((columns["place"], columns["low"], columns["high"]))
    high, low, place = (columns[name][order] for name in ("high", "low", "place"))
    starts = np.ones(len(place), dtype=bool)
    starts[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    begin = np.flatnonzero(starts)[np.cumsum(starts) - 1] if len(place) else np.empty(0, dtype=np.int64)
    return place, begin


RULES: Final[Mapping[str, GlobalRule]] = {
    rule.reason: rule
    for rule in (
        GlobalRule("duplicate_pair", False, _pair_keys, _judge_copies, lambda settings: settings.duplicate_pairs),
        GlobalRule(
            "duplicate_image",
            True,
            _hash_keys("image_hash"),
            _judge_copies,
            lambda settings: settings.duplicate_images == "drop",
        ),
        GlobalRule(
            "copied_image",
            True,
            _hash_keys("image_hash"),
            _judge_shared,
            lambda settings: settings.duplicate_images == "mark",
            rejects=False,
        ),
        GlobalRule(
            "near_duplicate_image",
            True,
            _near_keys,
            _judge_near,
            lambda settings: settings.near_images is not None,
            lambda settings, rows: len(band_masks(settings.near_images or 0, rows)),
        ),
        GlobalRule(
            "repeated_caption",
            False,
            _hash_keys("caption_hash"),
            _judge_repeats,
            lambda settings: settings.max_repeats is not None,
        ),
    )
}
"""In the order in which they are applied: what a rule rejects, the next ones do not see."""
