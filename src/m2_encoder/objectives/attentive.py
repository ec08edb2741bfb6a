"""Attentive masking: hide patches of an image by their similarity to its caption."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from m2_encoder.errors import UserError

AttentiveMode = Literal["high", "low"]


def attentive_mask(
    patch_features: Tensor,
    text_feature: Tensor,
    *,
    count: int,
    mode: AttentiveMode = "high",
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Hide the patches of each image that are most, or least, similar to its caption; without a gradient.

    SyCoCa selects patches by their similarity to the text, too. Which end is hidden, which share, and after which layer
    the similarity is taken, are our choice.

    Args:
        patch_features: (B, N, D), in the space of `text_feature`; need not be normalised.
        text_feature: of each image's caption, (B, D).
        count: patches to hide, 1 … N - 1.
        mode: "high" hides the most similar, which the caption describes; "low" the least similar.
        noise: standard deviation of a normal random number added to each cosine; 0 for always the same mask.
        generator: of the noise, on the features' device; None for torch's own.

    Returns:
        (B, N) bool; exactly `count` in each row are True, which hides a patch.

    Raises:
        UserError: if the shapes do not fit each other, or an argument is not allowed.

    Reference: SyCoCa (arXiv:2401.02137), attentive masking.
    """
    if patch_features.dim() != 3 or text_feature.shape != (patch_features.shape[0], patch_features.shape[2]):
        raise UserError(
            f"patch_features must be (B, N, D) and text_feature (B, D), got {tuple(patch_features.shape)} "
            f"and {tuple(text_feature.shape)}"
        )
    patches = patch_features.shape[1]
    if not 1 <= count < patches:
        raise UserError(f"count={count} must be 1 to {patches - 1} of {patches} patches")
    if mode not in get_args(AttentiveMode):
        raise UserError(f"mode must be one of 'high', 'low', got {mode!r}")
    if noise < 0:
        raise UserError(f"noise={noise} must be at least 0")
    with torch.no_grad():
        # Half precision would tie many patches.
        similarity = functional.cosine_similarity(patch_features.float(), text_feature.float()[:, None], dim=-1)
        if noise:
            similarity += noise * torch.randn(similarity.shape, generator=generator, device=similarity.device)
        chosen = similarity.topk(count, dim=1, largest=mode == "high", sorted=False).indices
        return torch.zeros_like(similarity, dtype=torch.bool).scatter_(1, chosen, True)
