"""Cross-modal masked image modelling (CMIM): hidden patches, predicted from the others and the caption.

    y_p = W h_p + b,   loss = mean over hidden p of  mean over pixels of (y_p - t_p)^2
    t_p: the pixels of patch p, less their mean, over their standard deviation

Reference: MAE (arXiv:2111.06377) for normalised pixels; BEiT (arXiv:2106.08254) for blocks of patches; SyCoCa
(arXiv:2401.02137) for the caption's part in it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from m2_encoder.errors import UserError
from m2_encoder.objectives.base import LocalObjective, LocalTerms, ModelShape, Passes

_EPS = 1e-6  # of the variance of a patch, in units of 255 levels squared; MAE's
_INIT_STD = 0.02


class MaskedImage(LocalObjective):
    """CMIM on normalised pixels, over the hidden patches that the data module chose.

    Args:
        weight: factor in the sum of objectives.
        schedule: see `Objective`.
        mask_ratio: share of the patches that are hidden, in blocks; the released configuration names 80 of 196.
        text_expert: see `LocalObjective`.

    Raises:
        UserError: for a ratio outside (0, 1).
    """

    passes = frozenset({"masked_image"})
    optional_parts = frozenset({"mask_token"})

    def __init__(
        self,
        *,
        weight: float = 1.0,
        schedule: Mapping[int, float] | None = None,
        mask_ratio: float = 80 / 196,
        text_expert: bool = False,
    ) -> None:
        super().__init__(weight=weight, schedule=schedule, text_expert=text_expert)
        if not 0 < mask_ratio < 1:
            raise UserError(f"mask_ratio={mask_ratio!r} must be above 0 and below 1")
        self.patch_ratio = mask_ratio

    def build(self, shape: ModelShape) -> None:
        """Make the head."""
        self._patch_size = shape.patch_size
        self.pixels = nn.Linear(shape.embed_dim, 3 * shape.patch_size**2)
        nn.init.normal_(self.pixels.weight, std=_INIT_STD)
        nn.init.zeros_(self.pixels.bias)

    def terms(self, passes: Passes) -> LocalTerms:
        """One term per hidden patch."""
        batch = passes.batch
        assert batch.patch_mask is not None, "the pass exists only with hidden patches"
        hidden = passes.masked_image(batch.patch_mask)
        chosen = batch.patch_mask.repeat_interleave(batch.captions_per_image, dim=0)
        rows, places = chosen.nonzero(as_tuple=True)
        targets = normalized_patches(batch.images, self._patch_size)[rows // batch.captions_per_image, places]
        predicted = self.pixels(hidden[rows, places]).to(targets.dtype)
        losses = (predicted - targets).square().mean(dim=1)
        return LocalTerms(losses.new_zeros(len(chosen)).index_add(0, rows, losses), chosen.sum(dim=1))


def normalized_patches(images: Tensor, patch_size: int) -> Tensor:
    """Patches with mean 0 and variance 1.

    Args:
        images: (B, 3, S, S), uint8 in 0..255 or floating in 0..1.
        patch_size: P.

    Returns:
        (B, patches, 3 * P * P), fp32 (fp64 for fp64), row by row; within a patch row, column, channel.
    """
    pixels = (
        images.float() / 255
        if images.dtype == torch.uint8
        else images.to(torch.promote_types(images.dtype, torch.float32))
    )
    batch, channels, side, _ = pixels.shape
    grid = side // patch_size
    patches = pixels.reshape(batch, channels, grid, patch_size, grid, patch_size).permute(0, 2, 4, 3, 5, 1)
    patches = patches.reshape(batch, grid * grid, -1)
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (variance + _EPS).sqrt()
