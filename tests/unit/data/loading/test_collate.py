"""Batches of images, whichever way round they lie in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m2_encoder.data.loading.collate import stack_images


@given(layout=st.lists(st.booleans(), min_size=1, max_size=5), side=st.integers(1, 6))
def test_a_batch_holds_the_images_whatever_their_layout(layout: list[bool], side: int) -> None:
    plain = torch.arange(len(layout) * 3 * side * side, dtype=torch.uint8).reshape(len(layout), 3, side, side)
    images = [
        image.permute(1, 2, 0).contiguous().permute(2, 0, 1) if last else image
        for image, last in zip(plain, layout, strict=True)
    ]
    assert torch.equal(stack_images(images), plain)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_layout_of_images_is_that_of_their_batch(channels_last: bool) -> None:
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    if channels_last:
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    batch = stack_images([image] * 2)
    assert batch.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
