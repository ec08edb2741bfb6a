"""How well images survive their codes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Reconstruction(NamedTuple):
    """Quality of reconstructed images and use of the codes."""

    psnr: float  # mean over images of the peak signal-to-noise ratio, dB
    perplexity: float  # exp of the entropy of the codes
    codes_used: int  # how many codes occur


class ReconstructionMeter:
    """Accumulates a `Reconstruction` over batches."""

    def __init__(self, num_codes: int) -> None:
        self._counts = torch.zeros(num_codes)
        self._psnr, self._images = 0.0, 0

    def add(self, true: Tensor, drawn: Tensor, codes: Tensor) -> None:
        """Adds a batch: true and reconstructed images in 0..1, (B, 3, S, S), and their codes, (B, N)."""
        self._psnr += float(psnr(true, drawn).sum())
        self._images += len(true)
        self._counts += torch.bincount(codes.flatten().cpu(), minlength=len(self._counts))

    def compute(self) -> Reconstruction:
        """Results of all batches; zeros without any."""
        return Reconstruction(
            self._psnr / max(1, self._images), perplexity(self._counts), int((self._counts > 0).sum())
        )


def psnr(true: Tensor, drawn: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images in 0..1, (B, 3, S, S) to (B,), dB; at most 100, for equal images."""
    error = (true - drawn).square().flatten(1).mean(dim=1)
    return -10 * error.clamp(min=1e-10).log10()


def perplexity(counts: Tensor) -> float:
    """Exponential of the entropy of counts, (K,); 0 if all are 0."""
    shares = counts.double() / counts.sum().clamp(min=1)
    return float((-torch.special.xlogy(shares, shares).sum()).exp()) if bool(counts.any()) else 0.0
