"""Image position tables of another grid.

Letters: G patches along one side · D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from m2_encoder.errors import CheckpointError

NUM_PREFIX_ROWS = 3
"""Rows before the grid: two reserved ones and the cls token's. They are copied as they are."""


def resize_image_positions(table: Tensor, num_rows: int) -> Tensor:
    """Fit an image position table to another image size.

    The grid is resized by area interpolation, as the official loader does for one of its two checkpoint wrappers. (For
    the other it cuts larger tables to their first rows, which scrambles the grid.)

    Args:
        table: (G^2 + 3, D), floating point.
        num_rows: G'^2 + 3 of the model.

    Returns:
        (G'^2 + 3, D) in the dtype of the table, computed in fp32; the table itself if the sizes are equal.

    Raises:
        CheckpointError: if either number of rows belongs to no square grid.
    """
    if table.shape[0] == num_rows:
        return table
    old, new = _grid(table.shape[0]), _grid(num_rows)
    prefix, grid = table[:NUM_PREFIX_ROWS], table[NUM_PREFIX_ROWS:]
    pixels = grid.float().t().reshape(1, -1, old, old)
    resized = functional.interpolate(pixels, size=(new, new), mode="area")
    return torch.cat([prefix, resized.flatten(2)[0].t().to(table.dtype)])


def _grid(rows: int) -> int:
    side = math.isqrt(max(0, rows - NUM_PREFIX_ROWS))
    if side < 1 or side * side != rows - NUM_PREFIX_ROWS:
        raise CheckpointError(
            f"an image position table of {rows} rows has no square grid (expected G*G + {NUM_PREFIX_ROWS}); "
            "the checkpoint was trained on images that are not square"
        )
    return side
