"""Resizing image position tables."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m2_encoder import CheckpointError
from m2_encoder.checkpoints.positions import resize_image_positions
from tests.support.closeness import assert_close_in_ulps


@given(old=st.integers(1, 9), new=st.integers(1, 9), width=st.integers(1, 5))
def test_equals_averages_over_areas(old: int, new: int, width: int) -> None:
    """Written out: a new cell is the mean of the old cells it touches."""
    table = torch.rand(old * old + 3, width)  # of one sign: nothing cancels
    resized = resize_image_positions(table, new * new + 3)
    assert torch.equal(resized[:3], table[:3])
    cells = table[3:].view(old, old, width)
    for row in range(new):
        rows = slice(row * old // new, -(-(row + 1) * old // new))
        for column in range(new):
            columns = slice(column * old // new, -(-(column + 1) * old // new))
            expected = cells[rows, columns].mean(dim=(0, 1))
            assert_close_in_ulps(resized[3 + row * new + column], expected)


def test_equal_grid_is_the_same_tensor() -> None:
    table = torch.randn(19, 4)
    assert resize_image_positions(table, 19) is table


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keeps_the_dtype_and_computes_in_fp32(dtype: torch.dtype) -> None:
    table = torch.randn(67, 4).to(dtype)
    resized = resize_image_positions(table, 19)
    assert resized.dtype == dtype
    assert torch.equal(resized[3:], resize_image_positions(table.float(), 19)[3:].to(dtype))


@pytest.mark.parametrize(("rows", "new"), [(3, 19), (2, 19), (0, 19), (20, 19), (19, 20), (15, 19)])
def test_no_square_grid(rows: int, new: int) -> None:
    with pytest.raises(CheckpointError, match="has no square grid"):
        resize_image_positions(torch.zeros(rows, 4), new)
