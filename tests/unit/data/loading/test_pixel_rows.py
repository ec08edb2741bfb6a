"""Images of a batch, one behind the other in one memory: filled in place, joined without a copy, shared by workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from m2_encoder.data.loading.collate import stack_images
from m2_encoder.data.loading.pixel_rows import PixelRows, join_rows


def make_images(count: int, side: int, *, channels_last: bool) -> list[torch.Tensor]:
    plain = torch.arange(count * 3 * side * side).remainder(251).to(torch.uint8).reshape(count, 3, side, side)
    return [image.permute(1, 2, 0).contiguous().permute(2, 0, 1) if channels_last else image.clone() for image in plain]


@given(count=st.integers(1, 6), side=st.integers(1, 6), channels_last=st.booleans())
def test_rows_are_joined_where_they_lie(count: int, side: int, channels_last: bool) -> None:
    images = make_images(count, side, channels_last=channels_last)
    rows = PixelRows(count)
    kept = [rows.keep(image) for image in images]
    assert all(torch.equal(mine, image) for mine, image in zip(kept, images, strict=True))
    assert not {image.data_ptr() for image in images} & {row.data_ptr() for row in kept}
    batch = stack_images(kept)
    assert torch.equal(batch, torch.stack(images))
    assert batch.data_ptr() == kept[0].data_ptr()
    layout = torch.channels_last if channels_last and side > 1 else torch.contiguous_format
    assert batch.is_contiguous(memory_format=layout)


def test_images_of_another_shape_layout_or_number_are_left_as_they_are() -> None:
    first, second = make_images(2, 4, channels_last=True)
    rows = PixelRows(2)
    kept = [rows.keep(first), rows.keep(make_images(1, 5, channels_last=True)[0])]
    assert torch.equal(kept[1], make_images(1, 5, channels_last=True)[0])
    assert join_rows(kept) is None
    turned = make_images(1, 4, channels_last=False)[0]
    assert torch.equal(rows.keep(turned), turned)
    kept = [kept[0], rows.keep(second)]
    extra = rows.keep(first)
    assert extra is first
    assert torch.equal(stack_images([*kept, extra]), torch.stack([first, second, first]))


@pytest.mark.parametrize("order", [[1, 0], [0, 2], [0, 0], [2]])
def test_only_rows_in_their_order_are_joined(order: list[int]) -> None:
    images = make_images(3, 4, channels_last=True)
    rows = PixelRows(3)
    kept = [rows.keep(image) for image in images]
    chosen = [kept[i] for i in order]
    assert torch.equal(stack_images(chosen), torch.stack([images[i] for i in order]))
    assert (join_rows(chosen) is None) == (order != [2])


class Batches(Dataset[Any]):
    """Batches that are made in a worker; tells whether their memory is shared before they are handed over."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[torch.Tensor, bool]:
        rows = PixelRows(3)
        batch = stack_images([rows.keep(image + index) for image in make_images(3, 8, channels_last=True)])
        return batch, batch.is_shared()


def test_workers_fill_memory_that_is_shared_already() -> None:
    expected = torch.stack(make_images(3, 8, channels_last=True))
    for index, (batch, was_shared) in enumerate(DataLoader(Batches(), batch_size=None, num_workers=1)):
        assert was_shared
        assert torch.equal(batch, expected + index)
