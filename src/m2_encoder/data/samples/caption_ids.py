"""Ids of the captions by a further tokenizer, for whoever reads the same captions as the model, such as a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from m2_encoder.data.samples.sample import Column, Sample
from m2_encoder.types import TextTokens


class CaptionIds(Column):
    """Ids and mask of each drawn caption, (k * B, 2, T).

    Args:
        tokenizer: texts to ids and mask, (B, T) each.
    """

    per_caption = True

    def __init__(self, tokenizer: Callable[[list[str]], TextTokens]) -> None:
        self._tokenizer = tokenizer

    def read(self, sample: Sample) -> list[str]:
        """Its captions."""
        return [caption.text for caption in sample.captions]

    def collate(self, values: Sequence[str]) -> Tensor:
        """Their ids and mask, padded to the longest."""
        ids, mask = self._tokenizer([*values])
        return torch.stack([ids, mask.to(ids.dtype)], dim=1)
