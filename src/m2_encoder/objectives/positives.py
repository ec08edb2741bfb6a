"""The positives of each local row among all rows of a contrastive group."""

from __future__ import annotations

import torch
from torch import Tensor


class Positives:
    """Sums over the positives of each local image, without a (local x group) table.

    Rows with the same identity are positives of each other, with equal shares. Without identities an image and its own
    captions match, and nothing has to be looked for.

    Args:
        identity: of the local images, (n,) int64; None: only own captions match.
        all_identity: of all images of the group, (M,) int64; not looked at without `identity`.
        own: rows of the local images among all.
        captions: captions per image, c; caption j belongs to image j // c.
    """

    def __init__(self, identity: Tensor | None, all_identity: Tensor, *, own: slice, captions: int) -> None:
        self.captions = captions
        self._own = own
        self._has_classes = identity is not None
        if identity is None:
            return
        classes, self._class_of_local = torch.unique(identity, return_inverse=True)
        place = torch.searchsorted(classes, all_identity).clamp_(max=classes.shape[0] - 1)
        self._rows = (classes[place] == all_identity).nonzero().squeeze(1)
        self._class_of_row = place[self._rows]
        self._sizes = torch.bincount(self._class_of_row, minlength=classes.shape[0])

    def mean(self, values: Tensor, per_row: int, dtype: torch.dtype) -> Tensor:
        """Mean of the positives' rows for each local image.

        Args:
            values: of all images or texts, (M or c * M, E).
            per_row: rows per image, 1 or c.
            dtype: of the sums.

        Returns:
            (n, E); may share memory with `values`.
        """
        if not self._has_classes:
            own = values[self._own.start * per_row : self._own.stop * per_row].to(dtype)
            return own if per_row == 1 else own.unflatten(0, (-1, per_row)).mean(dim=1)
        sums = self._class_sums(values, per_row, None, dtype)
        return (sums / (per_row * self._sizes).unsqueeze(1))[self._class_of_local]

    def weighted_sum(self, values: Tensor, per_row: int, shares: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
        """What the targets of both sides give for each local image's row, in units of a local image's share.

        A pair is a target of its image, with share 1 / (c * size of its class), and of its text, with share 1 / size;
        the text's loss counts 1 / c of an image's. Rows of another rank count by its number of rows (`shares`).

        Args:
            values: of all images or texts, (M or c * M, E).
            per_row: rows per image, 1 or c.
            shares: weight of each row's loss over that of a local image's, (M or c * M,).
            dtype: of the sums.

        Returns:
            A tensor (n, E), which may share memory with `values`, and a factor to multiply it with.
        """
        if not self._has_classes:
            own = values[self._own.start * per_row : self._own.stop * per_row]
            return (own if per_row == 1 else own.unflatten(0, (-1, per_row)).sum(dim=1, dtype=dtype)), 2 / self.captions
        weights = 1 + per_row * shares
        sums = self._class_sums(values, per_row, weights, dtype)
        return (sums / self._sizes.unsqueeze(1))[self._class_of_local], 1 / self.captions

    def add_to_texts(self, total: Tensor, images: Tensor, *, alpha: float) -> None:
        """Add to every text of the group `alpha` times the sum of its local positives over its number of positives.

        Args:
            total: of all texts, (c * M, E); changed in place.
            images: the local ones, (n, E).
            alpha: factor.
        """
        if not self._has_classes:
            own = total[self._own.start * self.captions : self._own.stop * self.captions]
            own.add_(images.repeat_interleave(self.captions, dim=0) if self.captions > 1 else images, alpha=alpha)
            return
        sums = torch.zeros((self._sizes.shape[0], images.shape[1]), dtype=total.dtype, device=total.device)
        sums.index_add_(0, self._class_of_local, images.to(total.dtype))
        values = (sums / self._sizes.unsqueeze(1))[self._class_of_row]
        for caption in range(self.captions):
            total.index_add_(0, self._rows * self.captions + caption, values, alpha=alpha)

    def _class_sums(self, values: Tensor, per_row: int, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
        total = torch.zeros((self._sizes.shape[0], values.shape[1]), dtype=dtype, device=values.device)
        for caption in range(per_row):
            rows = self._rows * per_row + caption
            part = values[rows].to(dtype)
            if weights is not None:
                part = part * weights[rows].unsqueeze(1)
            total.index_add_(0, self._class_of_row, part)
        return total
