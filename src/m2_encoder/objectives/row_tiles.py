"""Losses of local rows against all rows of the group, for objectives that need whole rows of logits, a few at a time.

A tile is a run of local rows with all columns. It is checkpointed, so that of (local x group) matrices only one tile is
ever held, in forward as in backward; the gathered rows are differentiable, and their gradients return to their ranks by
one reduce-scatter each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from m2_encoder.distributed.collectives import gather_rows, gather_rows_without_grad
from m2_encoder.errors import UserError
from m2_encoder.objectives.base import ObjectiveInputs

_TILE_BYTES: Final = 16 << 20
"""Of one matrix of a tile."""


class GroupRows(NamedTuple):
    """Rows of the group, and which of them are this rank's."""

    images: Tensor  # (M, E), differentiable, fp32 at least
    texts: Tensor  # (k * M, E), likewise
    identity: Tensor  # equal numbers mark the same content, (M,) int64
    first: int  # number of the first local image
    local: int  # n, how many are local
    captions: int  # k; text j describes image j // k

    @property
    def own_images(self) -> slice:
        """The local ones."""
        return slice(self.first, self.first + self.local)

    @property
    def own_texts(self) -> slice:
        """The local ones."""
        return slice(self.first * self.captions, (self.first + self.local) * self.captions)

    @property
    def text_identity(self) -> Tensor:
        """Of the images that the texts describe, (k * M,) int64."""
        return self.identity.repeat_interleave(self.captions)


def gather_group(inputs: ObjectiveInputs, *, images: bool = True) -> GroupRows:
    """Features of all ranks of the group, which must hold equally many rows.

    Args:
        inputs: the local rows.
        images: gather images, too; otherwise `images` holds the local ones.

    Raises:
        UserError: for shapes that do not fit.
    """
    own_images, own_texts = inputs.image_features, inputs.text_features
    count = len(own_images)
    if not count or len(own_texts) % count:
        raise UserError(f"{len(own_texts)} texts cannot be divided among {count} images")
    dtype = torch.promote_types(own_images.dtype, torch.float32)
    own_images, own_texts, identity = own_images.to(dtype), own_texts.to(dtype), inputs.identity
    first, group = 0, inputs.group
    if group is not None:
        first = dist.get_rank(group) * count
        own_images = gather_rows(own_images, group) if images else own_images
        own_texts = gather_rows(own_texts, group)
        identity = gather_constant(identity, group)
    return GroupRows(own_images, own_texts, identity, first, count, len(inputs.text_features) // count)


def gather_constant(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Rows of all ranks of the group, without gradients; each rank holds equally many."""
    if group is None:
        return rows.detach()
    return torch.cat(gather_rows_without_grad(rows, group, counts=[len(rows)] * dist.get_world_size(group)))


def map_rows(losses: Callable[[slice], Tensor], rows: int, columns: int, *, element_size: int = 4) -> Tensor:
    """Values of rows, made tile by tile, and made again in backward.

    Args:
        losses: gives the values of some rows, (t,); it makes a few matrices (t, columns) and forgets them.
        rows: how many there are.
        columns: of a matrix.
        element_size: bytes of an element.

    Returns:
        (rows,).
    """
    size = max(1, _TILE_BYTES // (element_size * max(1, columns)))
    parts = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    return torch.cat([checkpoint(losses, part, use_reentrant=False, preserve_rng_state=False) for part in parts])
