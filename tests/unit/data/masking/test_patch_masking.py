from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from m2_encoder.data.masking.patch_masking import BlockMasking


@settings(max_examples=200)
@given(data=st.data(), grid=st.integers(2, 20), seed=st.integers(0, 2**32))
def test_exactly_as_many_as_asked_for(data: st.DataObject, grid: int, seed: int) -> None:
    count = data.draw(st.integers(1, grid * grid - 1))
    masking = BlockMasking(grid, count=count)
    mask = masking.mask_patches(np.random.default_rng(seed))
    assert (mask.shape, mask.dtype) == ((grid * grid,), np.dtype(bool))
    assert int(mask.sum()) == count
    assert np.array_equal(mask, masking.mask_patches(np.random.default_rng(seed)))


def test_masks_are_blocks() -> None:
    """Neighbours share their fate far more often than at random, where 80 of 196 would give 0.52."""
    masking = BlockMasking(14, count=80)
    rng = np.random.default_rng(1)
    masks = np.stack([masking.mask_patches(rng) for _ in range(300)]).reshape(-1, 14, 14)
    equal = np.concatenate([(masks[:, 1:] == masks[:, :-1]).ravel(), (masks[:, :, 1:] == masks[:, :, :-1]).ravel()])
    assert equal.mean() > 0.8
    # Every patch is hidden sometimes, no side is preferred.
    shares = masks.mean(axis=0)
    assert shares.min() > 0.01
    assert np.abs(shares - shares[::-1]).max() < 0.15
    assert np.abs(shares - shares[:, ::-1]).max() < 0.15
    assert np.abs(shares - shares.T).max() < 0.15


def test_first_block_has_beits_area_and_aspect() -> None:
    """The first rectangle alone: of 21 patches per side, 36 are the least area, and all that is hidden."""
    masking = BlockMasking(21, count=36)
    rng = np.random.default_rng(2)
    shapes = set()
    for _ in range(300):
        rows, columns = np.nonzero(masking.mask_patches(rng).reshape(21, 21))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        if height * width == 36:
            shapes.add((int(height), int(width)))
    # 36 = 6 x 6 = 4 x 9 = 9 x 4; 3 x 12 has an aspect below 0.3.
    assert shapes == {(6, 6), (4, 9), (9, 4)}
