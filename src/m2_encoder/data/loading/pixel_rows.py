"""Memory for a batch's images, filled one by one while they are in the processor's cache.

Stacking them at the end would copy all of them from main memory, and once more to memory shared with the trainer.

Letters: B images of a batch · S image side in pixels
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info


class PixelRows:
    """Memory for B images of the shape and layout of the first one."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._taken = 0
        self._rows: Tensor | None = None
        self._shape = torch.Size()

    def keep(self, image: Tensor) -> Tensor:
        """Copy a uint8 image behind the last one; an image of another shape than the first is returned as it is."""
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
    """(B, ...) view of images that lie one behind the other in memory, as `PixelRows` puts them; None for others."""
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
    """Uninitialised bytes; in a worker process in shared memory, as torch's own collate function uses it."""
    if get_worker_info() is None:
        return torch.from_numpy(np.empty((count, *shape), np.uint8))
    size = count * math.prod(shape)
    memory = torch.UntypedStorage._new_shared(size, device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(memory).view(count, *shape)
