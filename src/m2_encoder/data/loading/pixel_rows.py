"""The memory of a batch's images, filled one by one while they are still in the processor's cache.

Stacking them at the end would read and write all of them once more, from main memory; and a worker would copy the batch
again, to memory that it shares with the training process.

Legend: B images of a batch · S image side in pixels
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info


class PixelRows:
    """Memory for the images of one batch; the first image decides about its shape and layout.

    Args:
        count: B.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._taken = 0
        self._rows: Tensor | None = None
        self._shape = torch.Size()

    def keep(self, image: Tensor) -> Tensor:
        """Copy an image behind the last one.

        Args:
            image: uint8, on the CPU.

        Returns:
            The copy, laid out as the image was; the image itself where it has another shape than the first one.
        """
        turned = image.permute(1, 2, 0) if image.ndim == 3 else image
        is_last = turned.is_contiguous()  # channels
        source = turned if is_last else image
        if self._rows is None:
            self._shape = source.shape
            self._rows = _allocate(self._count, source.shape)
        if source.shape != self._shape or self._taken == self._count:
            return image
        row = self._rows[self._taken]
        self._taken += 1
        row.numpy()[...] = source.numpy()  # torch would wake its pool of threads for that
        return row.permute(2, 0, 1) if is_last else row


def join_rows(images: Sequence[Tensor]) -> Tensor | None:
    """(B, ...) of images that lie one behind the other, as `PixelRows` leaves them, without a copy; None for others."""
    first = images[0]
    step, begin = first.numel(), first.storage_offset()
    memory = first.untyped_storage().data_ptr()
    for number, image in enumerate(images):
        if (
            image.storage_offset() != begin + number * step
            or image.untyped_storage().data_ptr() != memory
            or image.shape != first.shape
            or image.stride() != first.stride()
            or image.dtype != first.dtype
        ):
            return None
    return first.as_strided((len(images), *first.shape), (step, *first.stride()), begin)


def _allocate(count: int, shape: torch.Size) -> Tensor:
    """Bytes; in a worker process in memory that others can map, as torch's own collating takes it."""
    if get_worker_info() is None:
        return torch.from_numpy(np.empty((count, *shape), np.uint8))
    size = count * math.prod(shape)
    memory = torch.UntypedStorage._new_shared(size, device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(memory).view(count, *shape)
