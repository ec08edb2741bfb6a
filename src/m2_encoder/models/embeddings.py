"""Embeddings of images and texts. Letters are explained in `m2_encoder.types`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from m2_encoder.errors import UserError
from m2_encoder.models.config import NUM_RESERVED_POSITIONS, M2EncoderConfig

_OVERSHOOT = 0.1
"""What a bicubic resize may leave beyond 0..1."""


class ImageEmbedding(nn.Module):
    """Patch projection, cls token, mask token and learned positions of images."""

    def __init__(self, config: M2EncoderConfig) -> None:
        super().__init__()
        self.image_size = config.image_size
        self.proj = nn.Conv2d(3, config.embed_dim, kernel_size=config.patch_size, stride=config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.positions = nn.Embedding(config.num_image_positions, config.embed_dim)

    def forward(self, images: Tensor, *, patch_mask: Tensor | None = None) -> Tensor:
        """Embed images: cls, then the patches row by row, positions added, (B, N, D).

        Args:
            images: (B, 3, S, S), uint8 in 0..255 or floating in 0..1. Normalised here: (x - 0.5) / 0.5.
            patch_mask: True where a patch is replaced by the mask token, (B, patches) bool, row by row.

        Raises:
            UserError: for another shape or dtype.
        """
        self._check(images)
        pixels = images.to(self.proj.weight.dtype)
        pixels = pixels / 127.5 - 1 if images.dtype == torch.uint8 else (pixels - 0.5) / 0.5
        patches = self.proj(pixels).flatten(2).transpose(1, 2)
        if patch_mask is not None:
            if patch_mask.shape != patches.shape[:2]:
                raise UserError(f"patch_mask has shape {tuple(patch_mask.shape)}, expected {tuple(patches.shape[:2])}")
            patches = torch.where(patch_mask.bool().unsqueeze(-1), self.mask_token.to(patches.dtype), patches)
        cls = self.cls_token.to(patches.dtype).expand(patches.shape[0], -1, -1)
        return torch.cat([cls, patches], dim=1) + self.positions.weight[NUM_RESERVED_POSITIONS:]

    def _check(self, images: Tensor) -> None:
        side = self.image_size
        if not isinstance(images, Tensor):
            raise UserError(
                f"images are {type(images).__name__}, expected a tensor (B, 3, {side}, {side}): "
                "encode_image(torch.stack([preprocess(image) for image in images]))"
            )
        if images.dim() == 4 and images.shape[1:] == (side, side, 3):
            raise UserError(
                f"images have shape {tuple(images.shape)}, with the channels last; expected (B, 3, {side}, {side}): "
                "images.permute(0, 3, 1, 2)"
            )
        if images.dim() != 4 or images.shape[1:] != (3, side, side):
            raise UserError(
                f"images have shape {tuple(images.shape)}, expected (B, 3, {side}, {side}); use the preprocess "
                "function that belongs to the model, or build the model with another image_size"
            )
        if not (images.is_floating_point() or images.dtype == torch.uint8):
            raise UserError(f"images are {images.dtype}, expected uint8 in 0..255 or floating point in 0..1")


def check_pixels(images: Tensor) -> None:
    """Refuse floating pixels that are no images in 0..1, within a little; on an accelerator it waits for them.

    Raises:
        UserError: for values in 0..255 or -1..1, NaN, or infinite ones.
    """
    if not images.is_floating_point() or not images.numel():
        return
    if images.device.type == "meta" or torch.compiler.is_compiling():
        return
    least, most = torch.stack(images.detach().aminmax()).tolist()
    if not math.isfinite(least + most):
        raise UserError("images hold NaN or infinite values; expected floating point in 0..1, or uint8 in 0..255")
    if least < -_OVERSHOOT or most > 1 + _OVERSHOOT:
        fix = "images / 255, or images.to(torch.uint8)" if least >= 0 else "give them before any normalisation"
        raise UserError(f"images reach from {least:.4g} to {most:.4g}, expected floating point in 0..1: {fix}")


class TextEmbedding(nn.Module):
    """Token table and learned positions of texts; positions restart for a text behind an image.

    With `adapter_width`, the buffer `han_pieces` says which ids hold Chinese characters: 1 for those, else 0, (V,)
    fp32, as files hold it.
    """

    def __init__(self, config: M2EncoderConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.embed_dim)
        self.positions = nn.Embedding(config.num_text_positions, config.embed_dim)
        if config.adapter_width:
            self.register_buffer("han_pieces", torch.zeros(config.vocab_size))

    def forward(self, ids: Tensor) -> Tensor:
        """Embed token ids (B, T) int64 to (B, T, D)."""
        stop = NUM_RESERVED_POSITIONS + ids.shape[1]
        return self.tokens(ids) + self.positions.weight[NUM_RESERVED_POSITIONS:stop]

    def find_chinese(self, ids: Tensor, mask: Tensor) -> Tensor | None:
        """Whether texts hold a Chinese character, (B,) bool, by ids and mask (B, T); None without `han_pieces`."""
        pieces = getattr(self, "han_pieces", None)
        return None if pieces is None else ((pieces[ids] > 0) & mask).any(dim=1)
