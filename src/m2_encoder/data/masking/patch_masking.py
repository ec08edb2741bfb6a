"""Block-wise masks of image patches.

Letters: G patches per side · N = G·G patches
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_MIN_ASPECT = 0.3
_MAX_TRIES = 10


class BlockMasking:
    """BEiT's block-wise masking with an exact number of patches: rectangles of random shape until there are enough.

    As in BEiT, a rectangle's area is uniform between 16 of 196 patches and what is still missing, the logarithm of its
    aspect is uniform, it is smaller than the grid on both sides, its place is uniform, and rectangles may overlap. BEiT
    skips one that would hide too many patches, gives up after ten in a row, and so hides up to `count`; here such a
    rectangle is cut, row by row from a random end, to what is missing. If ten rectangles in a row add nothing, single
    visible patches are drawn.

    Args:
        grid: G.
        count: patches to hide, 1 … N - 1.

    Reference: BEiT (arXiv:2106.08254), algorithm 1.
    """

    def __init__(self, grid: int, *, count: int) -> None:
        assert 1 <= count < grid * grid, f"{count} of {grid * grid} patches"
        self._count = count
        self._min_block = min(max(1, round(grid * grid * 16 / 196)), count)
        self._grid = grid
        self._log_aspect = -math.log(_MIN_ASPECT)
        # The grid is one integer with a bit per patch, which is ten times as fast as arrays of this size.
        self._columns = [sum(1 << (grid * row) for row in range(height)) for height in range(grid)]

    def mask_patches(self, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
        """A random mask, (N,) bool, row by row; exactly `count` patches are True: hidden."""
        hidden = 0
        missing = self._count
        tries = 0
        while missing and tries < _MAX_TRIES:
            new = self._draw_block(rng, missing) & ~hidden
            tries = 0 if new else tries + 1
            if new.bit_count() > missing:
                new = _cut(new, missing, from_below=rng.random() < 0.5)
            hidden |= new
            missing -= new.bit_count()
        mask = self._to_array(hidden)
        if missing:
            mask[rng.choice(np.flatnonzero(~mask), size=missing, replace=False)] = True
        return mask

    def _draw_block(self, rng: np.random.Generator, missing: int) -> int:
        """Patches of a random rectangle; none if its shape does not fit."""
        shape, turn, top, left = rng.random(4).tolist()
        area = self._min_block + shape * (missing - self._min_block)
        side, stretch = math.sqrt(area), math.exp((turn - 0.5) * self._log_aspect)
        height, width = round(side * stretch), round(side / stretch)
        if not (0 < height < self._grid and 0 < width < self._grid):
            return 0
        row, column = int(top * (self._grid - height + 1)), int(left * (self._grid - width + 1))
        return (((1 << width) - 1) * self._columns[height]) << (row * self._grid + column)

    def _to_array(self, bits: int) -> npt.NDArray[np.bool_]:
        patches = self._grid * self._grid
        packed = np.frombuffer(bits.to_bytes(-(-patches // 8), "little"), dtype=np.uint8)
        return np.unpackbits(packed, count=patches, bitorder="little").astype(np.bool_)


def _cut(bits: int, count: int, *, from_below: bool) -> int:
    """The first or last `count` of the set bits."""
    for _ in range(bits.bit_count() - count):
        bits ^= 1 << (bits.bit_length() - 1) if from_below else bits & -bits
    return bits
