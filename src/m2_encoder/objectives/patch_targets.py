"""Targets of masked image modelling: pixels of hidden patches, or their codes by a frozen visual tokenizer.

    NormalizedPixels   y = W h + b,   loss = mean over pixels of (y - t)^2,   t: pixels less their mean, over their std
    VisualCodes        y = W h + b,   loss = -log softmax_c(y)[code of the patch]

h: state of the patch after the vision-language layers, (D,). Targets come from the clean image, without a gradient.

Letters: M hidden patches · K codes · N patches · D width.

Reference: MAE (arXiv:2111.06377) for normalised pixels; BEiT (arXiv:2106.08254) and BEiT v2 (arXiv:2208.06366) for
codes, 8,192 of width 32 in the latter, which the released configuration names, too.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from m2_encoder.bounds import Text, check_bounds
from m2_encoder.errors import NotGivenError, UserError
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.objectives.files import VISUAL_TOKENIZER, FileKind, Resources

if TYPE_CHECKING:  # objectives load no model
    from m2_encoder.models.visual_tokenizer import VisualTokenizer

_EPS = 1e-6  # added to the variance of a patch, as in MAE
_INIT_STD = 0.02


class PatchTargets(nn.Module, ABC):
    """A head on the states of hidden patches, and its targets.

    Attributes:
        score_names: names of the scores that `compare` returns, in every call.
        files: as in `Objective`.
    """

    score_names: tuple[str, ...] = ()
    files: ClassVar[Mapping[str, FileKind]] = {}

    def prepare(self, resources: Resources) -> None:
        """Load the files that `files` declares; called once, before `build`."""

    @abstractmethod
    def build(self, shape: M2EncoderConfig) -> None:
        """Make the head; called once.

        Raises:
            UserError: if the targets do not fit the model.
        """

    @abstractmethod
    def compare(
        self, states: Tensor, images: Tensor, rows: Tensor, places: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Losses of hidden patches, (M,) fp32 or wider, and scores by name, (M,) each, detached.

        Args:
            states: of hidden patches, (M, D).
            images: clean, (B, 3, S, S).
            rows: image of each, (M,) int64.
            places: its place in the image, row by row, (M,) int64.
        """

    @abstractmethod
    def draw(self, states: Tensor, images: Tensor, patch_mask: Tensor) -> Tensor:
        """Images with predicted pixels in place of hidden patches, (B, 3, S, S) fp32 in 0..1.

        Args:
            states: of the hidden patches, row by row, (M, D).
            images: clean, (B, 3, S, S).
            patch_mask: True where a patch is hidden, (B, N) bool.
        """


class NormalizedPixels(PatchTargets):
    """The pixels of a patch, less their mean, over their standard deviation."""

    def build(self, shape: M2EncoderConfig) -> None:
        """Make the head."""
        self._patch_size = shape.patch_size
        self.head = _make_head(shape, 3 * shape.patch_size**2)

    def compare(
        self, states: Tensor, images: Tensor, rows: Tensor, places: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Mean squared distance; no scores."""
        targets = normalized_patches(images, self._patch_size)[rows, places]
        predicted = self.head(states).to(targets.dtype)
        return (predicted - targets).square().mean(dim=1), {}

    @torch.no_grad()
    def draw(self, states: Tensor, images: Tensor, patch_mask: Tensor) -> Tensor:
        """As MAE: predictions take the mean and the deviation of the true patch, which are not predicted."""
        true = split_patches(images, self._patch_size).float()
        mean, scale = true.mean(dim=-1, keepdim=True), (true.var(dim=-1, keepdim=True) + _EPS).sqrt()
        drawn = true.clone()
        drawn[patch_mask] = self.head(states).float() * scale[patch_mask] + mean[patch_mask]
        return join_patches(drawn, self._patch_size).clamp(0, 1)


class VisualCodes(PatchTargets):
    """The code of a patch by a frozen visual tokenizer.

    The tokenizer is no sub-module: not in checkpoints, not in the optimizer, not replicated or sharded, but whole on
    every rank. It runs in fp32, so that a recomputed piece gets the same codes.

    Args:
        tokenizer: folder written by `m2-train +experiment=visual_tokenizer`; `prepare` loads it.
    """

    score_names = ("accuracy",)
    files = {"tokenizer": VISUAL_TOKENIZER}  # noqa: RUF012 - a ClassVar of PatchTargets

    @check_bounds
    def __init__(self, *, tokenizer: Text) -> None:
        super().__init__()
        self.tokenizer_name = tokenizer
        self._tokenizer: tuple[VisualTokenizer, ...] = ()  # a tuple hides it from nn.Module

    def prepare(self, resources: Resources) -> None:
        """Load the tokenizer, onto the CPU until the first step.

        Raises:
            UserError: for one that cannot be loaded, or whose image or patch size is not the model's.
        """
        self.read_with(resources.load_visual_tokenizer("tokenizer", self.tokenizer_name))
        self._check_patches(resources.config)

    def read_with(self, tokenizer: VisualTokenizer) -> None:
        """Take a tokenizer and freeze it; before `build`."""
        tokenizer.eval()
        tokenizer.requires_grad_(False)
        self._tokenizer = (tokenizer,)

    def build(self, shape: M2EncoderConfig) -> None:
        """Make the head."""
        self._check_patches(shape)
        self.head = _make_head(shape, self._get_tokenizer().num_codes)

    def _check_patches(self, shape: M2EncoderConfig) -> None:
        for key in ("image_size", "patch_size"):
            own, wanted = getattr(self._get_tokenizer(), key), getattr(shape, key)
            if own != wanted:
                fix = f"train one with m2-train +experiment=visual_tokenizer model.{key}={wanted}"
                text = f"has {key}={own}, the model {wanted}; {fix}"
                raise UserError(text, key="tokenizer", value=self.tokenizer_name)

    def compare(
        self, states: Tensor, images: Tensor, rows: Tensor, places: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Cross-entropy, and whether the code scored highest."""
        codes = self.encode(images)[rows, places]
        logits = self.head(states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        hits = (logits.detach().argmax(dim=1) == codes).to(logits.dtype)
        return functional.cross_entropy(logits, codes, reduction="none"), {"accuracy": hits}

    @torch.no_grad()
    def draw(self, states: Tensor, images: Tensor, patch_mask: Tensor) -> Tensor:
        """Decode the true codes of visible patches together with the likeliest codes of hidden ones."""
        codes = self.encode(images).clone()
        codes[patch_mask] = self.head(states).argmax(dim=-1)
        tokenizer = self._get_tokenizer()
        drawn = split_patches(tokenizer.decode(codes).float(), tokenizer.patch_size)
        true = split_patches(images, tokenizer.patch_size).float()
        return join_patches(torch.where(patch_mask[..., None], drawn, true), tokenizer.patch_size).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """True codes of all patches, (B, 3, S, S) to (B, N) int64."""
        tokenizer = self._get_tokenizer()
        tokenizer.to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            return tokenizer.encode(images)

    def _get_tokenizer(self) -> VisualTokenizer:
        if not self._tokenizer:
            raise NotGivenError(
                f"codes have no tokenizer yet; load {self.tokenizer_name!r} and call read_with(tokenizer)"
            )
        return self._tokenizer[0]


def split_patches(images: Tensor, patch_size: int) -> Tensor:
    """Pixels by patch, (B, N, 3 * P * P) in 0..1, fp32 (fp64 for fp64); within a patch by row, column, channel.

    Args:
        images: (B, 3, S, S), uint8 in 0..255 or floating in 0..1.
        patch_size: P.
    """
    pixels = (
        images.float() / 255
        if images.dtype == torch.uint8
        else images.to(torch.promote_types(images.dtype, torch.float32))
    )
    batch, channels, side, _ = pixels.shape
    grid = side // patch_size
    patches = pixels.reshape(batch, channels, grid, patch_size, grid, patch_size).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(batch, grid * grid, -1)


def join_patches(patches: Tensor, patch_size: int) -> Tensor:
    """Images of the patches of `split_patches`, (B, 3, S, S)."""
    grid = math.isqrt(patches.shape[1])
    pixels = patches.reshape(len(patches), grid, grid, patch_size, patch_size, -1).permute(0, 5, 1, 3, 2, 4)
    return pixels.reshape(len(patches), -1, grid * patch_size, grid * patch_size)


def normalized_patches(images: Tensor, patch_size: int) -> Tensor:
    """Patches with mean 0 and variance 1; arguments and shapes as in `split_patches`."""
    patches = split_patches(images, patch_size)
    return (patches - patches.mean(dim=-1, keepdim=True)) / (patches.var(dim=-1, keepdim=True) + _EPS).sqrt()


def _make_head(shape: M2EncoderConfig, outputs: int) -> nn.Linear:
    head = nn.Linear(shape.embed_dim, outputs)
    nn.init.normal_(head.weight, std=_INIT_STD)
    nn.init.zeros_(head.bias)
    return head
