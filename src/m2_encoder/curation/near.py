"""Near duplicates among many 64-bit hashes without comparing all pairs.

Two hashes that differ in at most d bits agree in at least b - d of b > d blocks of bits. So each choice of b - d blocks
makes a table of buckets, and a near pair shares a bucket of some table; only rows of a bucket are compared. More blocks
mean more tables with smaller buckets.

Reference: Manku, Jain, Das Sarma, Detecting Near-Duplicates for Web Crawling (WWW 2007), section 3.

Letters: n rows · T tables · d distance in bits.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from m2_encoder.data.order.keyed_random import scramble

UInts = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_BITS = 64
_TARGET_BUCKET = 16  # rows that meet by accident in a bucket, at most


class Nearest(NamedTuple):
    """Rows with an earlier near one."""

    place: UInts  # of the rows, (n,)
    first: UInts  # the earliest place that each is near to, (n,)


def band_masks(distance: int, rows: int) -> list[int]:
    """One mask per table, such that any two hashes within `distance` agree under at least one of them.

    Args:
        distance: d, bits.
        rows: how many hashes there are; more rows get masks of more bits.
    """
    wanted_bits = math.log2(max(rows, 1) / _TARGET_BUCKET) if rows > _TARGET_BUCKET else 1.0
    spare = next((s for s in range(1, 5) if _BITS * s / (distance + s) >= wanted_bits), 4)
    blocks = distance + spare
    edges = [round(_BITS * i / blocks) for i in range(blocks + 1)]
    masks = [(1 << high) - (1 << low) for low, high in itertools.pairwise(edges)]
    return [sum(chosen) for chosen in itertools.combinations(masks, spare)]


def band_keys(hashes: UInts, masks: list[int]) -> UInts:
    """Bucket of each hash in each table, (T, n) uint64, spread evenly."""
    keys = [scramble((hashes & np.uint64(mask)) + np.uint64(number)) for number, mask in enumerate(masks)]
    return np.stack(keys) if keys else np.empty((0, len(hashes)), dtype=np.uint64)


def find_earlier(
    bucket: UInts, hashes: UInts, colors: UInts, place: UInts, *, distance: int, tolerance: int
) -> Nearest:
    """For rows of buckets, the earliest row of the same bucket that each is near to.

    Args:
        bucket: (n,); a row of several buckets occurs several times.
        hashes: perceptual hashes, (n,).
        colors: mean colours 0xRRGGBB, (n,).
        place: order of the rows, (n,); equal for copies of a row.
        distance: bits that may differ.
        tolerance: difference of each colour channel.

    Returns:
        Rows that are near to an earlier one, each once, in order.
    """
    order = np.lexsort((place, colors, hashes, bucket))
    bucket, hashes, colors, place = bucket[order], hashes[order], colors[order], place[order]
    starts = np.ones(len(place), dtype=bool)  # of runs of equal hash and colour, which are compared as one
    starts[1:] = (bucket[1:] != bucket[:-1]) | (hashes[1:] != hashes[:-1]) | (colors[1:] != colors[:-1])
    run = np.cumsum(starts) - 1
    first = _nearest_runs(bucket[starts], hashes[starts], colors[starts], place[starts], distance, tolerance)
    first = first[run] if len(run) else place
    return earliest(place[first < place], first[first < place])


def earliest(place: UInts, first: UInts) -> Nearest:
    """Each place once, with the least of its firsts."""
    order = np.lexsort((first, place))
    place, first = place[order], first[order]
    keep = np.ones(len(place), dtype=bool)
    keep[1:] = place[1:] != place[:-1]
    return Nearest(place[keep], first[keep])


def find_pairs(hashes: UInts, colors: UInts, *, distance: int, tolerance: int) -> Ints:
    """Pairs of rows, (m, 2), that connect all rows that are near to each other, over others if need be.

    Args:
        hashes: perceptual hashes, (n,).
        colors: mean colours 0xRRGGBB, (n,).
        distance: bits that may differ.
        tolerance: difference of each colour channel.
    """
    rows = np.lexsort((colors, hashes))
    is_copy = (hashes[rows[1:]] == hashes[rows[:-1]]) & (colors[rows[1:]] == colors[rows[:-1]])
    found = [np.stack([rows[:-1][is_copy], rows[1:][is_copy]], axis=1)]
    rows = rows[np.concatenate([np.ones(min(1, len(rows)), dtype=bool), ~is_copy])]
    for mask in band_masks(distance, len(rows)):
        keys = band_keys(hashes[rows], [mask])[0]
        order = np.argsort(keys, kind="stable")
        ordered, keys = rows[order], keys[order]
        left, offset = np.arange(len(rows) - 1), 1
        while len(left := left[left + offset < len(rows)]):
            left = left[keys[left] == keys[left + offset]]
            a, b = ordered[left], ordered[left + offset]
            near = _near(hashes[a], hashes[b], colors[a], colors[b], distance, tolerance)
            found.append(np.stack([a[near], b[near]], axis=1))
            offset += 1
    return np.concatenate(found)


def is_near_any(
    hashes: UInts, colors: UInts, known: UInts, known_colors: UInts, *, distance: int, tolerance: int
) -> Bools:
    """Which hashes (n,) are near to one of the known ones (m,): a mask, (n,)."""
    found = np.zeros(len(hashes), dtype=bool)
    masks = band_masks(distance, len(known))
    for keys, known_keys in zip(band_keys(hashes, masks), band_keys(known, masks), strict=True):
        order = np.argsort(known_keys, kind="stable")
        low = np.searchsorted(known_keys[order], keys, side="left")
        high = np.searchsorted(known_keys[order], keys, side="right")
        offset = 0
        open_rows = np.flatnonzero(low < high)
        while len(open_rows):
            other = order[low[open_rows] + offset]
            near = _near(hashes[open_rows], known[other], colors[open_rows], known_colors[other], distance, tolerance)
            found[open_rows[near]] = True
            offset += 1
            open_rows = open_rows[~near & (low[open_rows] + offset < high[open_rows])]
    return found


def _nearest_runs(bucket: UInts, hashes: UInts, colors: UInts, place: UInts, distance: int, tolerance: int) -> UInts:
    """Least place among each row and the rows of its bucket near to it; rows are distinct within a bucket."""
    order = np.lexsort((place, bucket))
    bucket, hashes, colors, place = bucket[order], hashes[order], colors[order], place[order]
    first = place.copy()
    left = np.arange(len(place) - 1)
    offset = 1
    while len(left := left[left + offset < len(place)]):
        left = left[bucket[left] == bucket[left + offset]]  # buckets that are wider than the offset
        right = left + offset
        near = _near(hashes[left], hashes[right], colors[left], colors[right], distance, tolerance)
        first[right[near]] = np.minimum(first[right[near]], place[left[near]])
        offset += 1
    back = np.empty_like(first)
    back[order] = first
    return back


def _near(a: UInts, b: UInts, color_a: UInts, color_b: UInts, distance: int, tolerance: int) -> Bools:
    near = np.bitwise_count(a ^ b) <= distance
    for shift in (16, 8, 0):
        channel_a = ((color_a >> np.uint64(shift)) & np.uint64(255)).astype(np.int64)
        channel_b = ((color_b >> np.uint64(shift)) & np.uint64(255)).astype(np.int64)
        near &= np.abs(channel_a - channel_b) <= tolerance
    return near
