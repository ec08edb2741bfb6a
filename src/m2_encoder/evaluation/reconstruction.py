"""How well images survive their codes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Reconstruction(NamedTuple):
    """How well images survive their codes."""

    psnr: float  # mean over images of the peak signal-to-noise ratio, dB
    perplexity: float  # exp of the entropy of the codes: as many equally frequent codes would be as varied
    codes_used: int  # how many codes occur


class ReconstructionMeter:
    """Adds batches up to a `Reconstruction`.

    Args:
        num_codes: K.
    """

    def __init__(self, num_codes: int) -> None:
        self._counts = torch.zeros(num_codes)
        self._psnr, self._images = 0.0, 0

    def add(self, true: Tensor, drawn: Tensor, codes: Tensor) -> None:
        """Take a batch: images in 0..1 as they are and as given back, (B, 3, S, S), and their codes, (B, N)."""
        self._psnr += float(psnr(true, drawn).sum())
        self._images += len(true)
        self._counts += torch.bincount(codes.flatten().cpu(), minlength=len(self._counts))

    def compute(self) -> Reconstruction:
        """What all batches give; zeros without any."""
        return Reconstruction(
            self._psnr / max(1, self._images), perplexity(self._counts), int((self._counts > 0).sum())
        )


def psnr(true: Tensor, drawn: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images in 0..1, (B, 3, S, S) to (B,), dB; at most 100, for equal images."""
    error = (true - drawn).square().flatten(1).mean(dim=1)
    return -10 * error.clamp(min=1e-10).log10()


def perplexity(counts: Tensor) -> float:
    """The exponential of the entropy of the shares of counts, (K,); 0 if all are 0."""
    shares = counts.double() / counts.sum().clamp(min=1)
    return float((-torch.special.xlogy(shares, shares).sum()).exp()) if bool(counts.any()) else 0.0
