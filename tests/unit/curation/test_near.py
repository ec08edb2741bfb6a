from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2_encoder.curation.near import band_keys, band_masks, earliest, find_earlier, is_near_any
from m2_encoder.data.order.keyed_random import scramble

BITS = 2**64 - 1


def flip(value: int, bits: list[int]) -> int:
    for bit in bits:
        value ^= 1 << bit
    return value


@settings(max_examples=60)
@given(
    distance=st.integers(0, 10),
    rows=st.sampled_from([1, 1_000, 10**6, 10**9]),
    value=st.integers(0, BITS),
    data=st.data(),
)
def test_close_hashes_meet_in_a_table(distance: int, rows: int, value: int, data: st.DataObject) -> None:
    bits = data.draw(st.lists(st.integers(0, 63), min_size=distance, max_size=distance, unique=True))
    keys = band_keys(np.array([value, flip(value, bits)], dtype=np.uint64), band_masks(distance, rows))
    assert (keys[:, 0] == keys[:, 1]).any()


def test_more_rows_get_finer_tables() -> None:
    few, many = band_masks(3, 10**6), band_masks(3, 10**9)
    assert (len(few), len(many)) == (4, 20)
    assert min(mask.bit_count() for mask in many) > min(mask.bit_count() for mask in few) >= 16


def test_mixing_is_a_bijection_that_spreads() -> None:
    values = scramble(np.arange(10_000, dtype=np.uint64))
    assert len(np.unique(values)) == 10_000
    counts = np.bincount((values % np.uint64(16)).astype(np.int64))
    assert counts.min() > 500


def plain_earlier(
    hashes: list[int], colors: list[int], places: list[int], distance: int, tolerance: int
) -> dict[int, int]:
    found: dict[int, int] = {}
    rows = sorted(zip(places, hashes, colors, strict=True))
    for (first, hash_a, color_a), (later, hash_b, color_b) in itertools.combinations(rows, 2):
        channels = [abs((color_a >> shift & 255) - (color_b >> shift & 255)) for shift in (16, 8, 0)]
        if (hash_a ^ hash_b).bit_count() <= distance and max(channels) <= tolerance:
            found.setdefault(later, first)
            found[later] = min(found[later], first)
    return found


@settings(max_examples=80)
@given(data=st.data(), distance=st.integers(0, 6), tolerance=st.sampled_from([0, 8, 255]))
def test_earlier_ones_are_those_of_all_pairs(data: st.DataObject, distance: int, tolerance: int) -> None:
    centres = data.draw(st.lists(st.integers(0, BITS), min_size=1, max_size=3))
    flips = st.lists(st.integers(0, 63), max_size=6, unique=True)
    rows = data.draw(st.lists(st.tuples(st.sampled_from(centres), flips, st.integers(0, 20)), min_size=1, max_size=25))
    hashes = [flip(centre, bits) for centre, bits, _ in rows]
    colors = [color << 16 | (20 - color) << 8 for _, _, color in rows]
    places = data.draw(st.permutations([7 * i for i in range(len(rows))]))
    masks = band_masks(distance, len(rows))
    look = np.array(hashes, dtype=np.uint64)
    found = find_earlier(
        band_keys(look, masks).reshape(-1),
        np.tile(look, len(masks)),
        np.tile(np.array(colors, dtype=np.uint64), len(masks)),
        np.tile(np.array(places, dtype=np.uint64), len(masks)),
        distance=distance,
        tolerance=tolerance,
    )
    expected = plain_earlier(hashes, colors, places, distance, tolerance)
    assert dict(zip(found.place.tolist(), found.first.tolist(), strict=True)) == expected
    assert found.place.tolist() == sorted(expected)


@settings(max_examples=60)
@given(data=st.data(), distance=st.integers(0, 6), tolerance=st.sampled_from([0, 255]))
def test_near_any_is_near_one(data: st.DataObject, distance: int, tolerance: int) -> None:
    known = data.draw(st.lists(st.integers(0, BITS), max_size=6))
    flips = st.lists(st.integers(0, 63), max_size=8, unique=True)
    rows = data.draw(st.lists(st.tuples(st.sampled_from(known or [5]), flips), max_size=10))
    hashes = [flip(centre, bits) for centre, bits in rows]
    found = is_near_any(
        np.array(hashes, dtype=np.uint64),
        np.zeros(len(hashes), dtype=np.uint64),
        np.array(known, dtype=np.uint64),
        np.zeros(len(known), dtype=np.uint64),
        distance=distance,
        tolerance=tolerance,
    )
    assert found.tolist() == [any((a ^ b).bit_count() <= distance for b in known) for a in hashes]


def test_color_keeps_looks_apart() -> None:
    same = np.zeros(1, dtype=np.uint64)
    red, blue = np.array([0xFF0000], dtype=np.uint64), np.array([0x0000FF], dtype=np.uint64)
    assert not is_near_any(same, red, same, blue, distance=0, tolerance=16).any()
    assert is_near_any(same, red, same, red - np.uint64(0x100000), distance=0, tolerance=16).all()


@pytest.mark.parametrize("count", [0, 1])
def test_earliest_of_little(count: int) -> None:
    found = earliest(np.arange(count, dtype=np.uint64), np.arange(count, dtype=np.uint64))
    assert len(found.place) == count
