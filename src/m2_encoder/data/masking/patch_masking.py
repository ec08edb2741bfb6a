"""Which patches of an image are hidden, for reconstructing them from the others and the caption.

Legend: G patches per side · N = G·G patches
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from m2_encoder.errors import UserError

# BEiT's numbers, of a grid of 14 × 14; on other grids the same shares.
_REFERENCE_PATCHES, _REFERENCE_COUNT, _REFERENCE_MIN_BLOCK = 196, 80, 16
_MIN_ASPECT = 0.3
_MAX_TRIES = 10


class BlockMasking:
    """BEiT's block-wise masking with an exact number of patches: rectangles of random shape until there are enough.

    As in BEiT, a rectangle's area is uniform between `min_block` and what is still missing, the logarithm of its aspect
    is uniform, it is smaller than the grid on both sides, its place is uniform, and rectangles may overlap. BEiT skips
    one that would hide too many patches, gives up after ten in a row, and so hides up to `count`; here such a rectangle
    is cut, row by row from a random end, to what is missing. What ten rectangles in a row do not add, because they lie
    in others, is drawn from the visible patches.

    Args:
        grid: G, patches per side.
        count: patches to hide, 1 … N - 1; None for BEiT's share, 80 of 196.
        min_block: least area of a rectangle, 1 … `count`; None for BEiT's share, 16 of 196.
        min_aspect: least ratio of a rectangle's sides, in (0, 1]; the highest is its inverse.

    Attributes:
        count: as given or scaled.
        min_block: as given or scaled.

    Raises:
        UserError: if a number is not allowed.

    Reference: BEiT (arXiv:2106.08254), algorithm 1.
    """

    def __init__(
        self, grid: int, *, count: int | None = None, min_block: int | None = None, min_aspect: float = _MIN_ASPECT
    ) -> None:
        patches = grid * grid
        if grid < 2:
            raise UserError(f"grid={grid} must be at least 2 patches per side, to hide some and see some")
        self.count = count if count is not None else max(1, round(patches * _REFERENCE_COUNT / _REFERENCE_PATCHES))
        if not 1 <= self.count < patches:
            raise UserError(f"count={self.count} must be 1 to {patches - 1} of the {patches} patches of grid={grid}")
        scaled = max(1, round(patches * _REFERENCE_MIN_BLOCK / _REFERENCE_PATCHES))
        self.min_block = min_block if min_block is not None else min(scaled, self.count)
        if not 1 <= self.min_block <= self.count:
            raise UserError(f"min_block={self.min_block} must be 1 to count={self.count} patches")
        if not 0 < min_aspect <= 1:
            raise UserError(f"min_aspect={min_aspect} must be above 0 and at most 1")
        self._grid = grid
        self._log_aspect = -math.log(min_aspect)
        # The grid is one integer with a bit per patch, which is ten times as fast as arrays of this size.
        self._columns = [sum(1 << (grid * row) for row in range(height)) for height in range(grid)]

    def mask_patches(self, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
        """Draws a mask.

        Args:
            rng: decides everything; the same state gives the same mask.

        Returns:
            (N,) bool, row by row; exactly `count` are True, which hides a patch.
        """
        hidden = 0
        missing = self.count
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
        area = self.min_block + shape * (missing - self.min_block)
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
