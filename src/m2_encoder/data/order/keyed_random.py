"""Randomness without state: numbers and permutations that are pure functions of a key.

numpy promises no stable streams between its versions, and a permutation of a billion items fills gigabytes; these are
eight lines of integer arithmetic each, and any place of a permutation costs the same.

Reference: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014); Feistel networks on arbitrary domains with cycle walking
(Black, Rogaway, CT-RSA 2002).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MASK = 2**64 - 1
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ROUNDS = 6  # even small domains are indistinguishable from uniform permutations in the tests


def mix(*values: int) -> int:
    """A 64-bit number that looks random and depends on all values, integers of any size, and on their order."""
    state = 0
    for value in values:
        while True:
            state = _scramble(state ^ (value & _MASK))
            value >>= 64
            if value in (0, -1):
                break
    return state


def uniforms(keys: Sequence[int], count: int) -> npt.NDArray[np.float64]:
    """`count` numbers in [0, 1) for each key of 64 bits, by SplitMix64, (len(keys), count)."""
    starts = np.array(keys, dtype=np.uint64)[:, None]
    steps = np.arange(count, dtype=np.uint64) * np.uint64(_GOLDEN)
    return (scramble(starts + steps) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class KeyedPermutation:
    """The permutation of 0..size - 1 that a key of 64 bits chooses, in constant memory."""

    __slots__ = ("_height", "_key", "_size", "_width")

    def __init__(self, size: int, key: int) -> None:
        assert size >= 1, f"nothing to permute: size={size}"
        self._size = size
        self._key = key
        self._width = math.isqrt(size - 1) + 1
        self._height = -(-size // self._width)

    def __call__(self, index: int) -> int:
        """Where an index goes."""
        width, height = self._width, self._height
        while True:
            row, column = divmod(index, width)
            key = self._key
            for step in range(_ROUNDS):
                key = (key + _GOLDEN) & _MASK
                if step % 2:
                    column = (column + _scramble(key ^ row)) % width
                else:
                    row = (row + _scramble(key ^ column)) % height
            index = row * width + column
            if index < self._size:  # the rectangle is less than a row larger than the domain
                return index

    def table(self) -> npt.NDArray[np.int64]:
        """Where every index goes, (size,)."""
        places = np.arange(self._size, dtype=np.uint64)
        pending = np.arange(self._size)
        while len(pending):
            places[pending] = self._walk(places[pending])
            pending = pending[places[pending] >= self._size]
        return places.astype(np.int64)

    def _walk(self, places: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        width, height = np.uint64(self._width), np.uint64(self._height)
        row, column = places // width, places % width
        key = self._key
        for step in range(_ROUNDS):
            key = (key + _GOLDEN) & _MASK
            if step % 2:
                column = _add(column, scramble(np.uint64(key) ^ row), width)
            else:
                row = _add(row, scramble(np.uint64(key) ^ column), height)
        return row * width + column


def _add(values: npt.NDArray[np.uint64], numbers: npt.NDArray[np.uint64], modulus: np.uint64) -> npt.NDArray[np.uint64]:
    """(values + numbers) mod modulus without the carry out of 64 bits."""
    return (values + numbers % modulus) % modulus


def _scramble(state: int) -> int:
    state = (state + _GOLDEN) & _MASK
    state = ((state ^ (state >> 30)) * _FIRST) & _MASK
    state = ((state ^ (state >> 27)) * _SECOND) & _MASK
    return state ^ (state >> 31)


def scramble(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Spread 64-bit numbers evenly, each to another one: a step of SplitMix64, a bijection."""
    state = state + np.uint64(_GOLDEN)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(_FIRST)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(_SECOND)
    return state ^ (state >> np.uint64(31))
