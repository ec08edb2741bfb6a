"""Masks of a batch for masked objectives: a function of the seed and each sample's position alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m2_encoder.data.masking.patch_masking import BlockMasking
from m2_encoder.data.masking.text_masking import MaskVocabulary, mask_words
from m2_encoder.data.order.keyed_random import mix
from m2_encoder.errors import UserError
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.objectives.base import LocalObjective, Objective, active
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.tokenizers.word_pieces import WordSegmenter
from m2_encoder.types import MaskedText, TextTokens

_WORDS, _PATCHES = 1, 2  # streams of random numbers


class BatchMasking:
    """Hides words of captions, patches of images, or both.

    Args:
        grid: patches per side of an image.
        word_ratio: share of the tokens of words to predict; None hides no words.
        patch_ratio: share of the patches to hide; None hides none.
        user_dictionary: more words for jieba, a file in its format.

    Raises:
        UserError: if `patch_ratio` hides no patch, or all.
    """

    def __init__(
        self,
        tokenizer: SentencePieceTokenizer,
        *,
        grid: int,
        word_ratio: float | None = None,
        patch_ratio: float | None = None,
        user_dictionary: str | None = None,
    ) -> None:
        self._word_ratio = word_ratio
        self._segmenter = WordSegmenter(tokenizer, user_dictionary=user_dictionary)
        self._vocabulary = MaskVocabulary.of(tokenizer)
        self._patches = None
        if patch_ratio is not None:
            count = round(patch_ratio * grid * grid) if math.isfinite(patch_ratio) else 0
            if not 0 < count < grid * grid:
                raise UserError(
                    f"mask_ratio={patch_ratio} hides {count} of the {grid * grid} patches; it must hide at least one "
                    "and not all"
                )
            self._patches = BlockMasking(grid, count=count)

    @property
    def hides_words(self) -> bool:
        """Whether captions are masked."""
        return self._word_ratio is not None

    def mask_texts(self, texts: Sequence[str], draws: Sequence[tuple[int, ...]]) -> tuple[TextTokens, MaskedText]:
        """Tokens of captions, exactly the tokenizer's, and the same with hidden words.

        Equal keys in `draws` and equal texts give equal masks.
        """
        assert self._word_ratio is not None, "hides no words"
        pieces = self._segmenter.segment_batch(texts)
        keys = [mix(_WORDS, *draw) for draw in draws]
        return pieces.text, mask_words(pieces, ratio=self._word_ratio, vocabulary=self._vocabulary, keys=keys)

    def mask_images(self, draws: Sequence[tuple[int, ...]]) -> Tensor | None:
        """Which patches are hidden, (B, patches) bool, by a key for each image; None if none are."""
        if self._patches is None:
            return None
        # From a key a generator is made five times as fast as from a seed.
        generators = (np.random.Generator(np.random.Philox(key=mix(_PATCHES, *draw))) for draw in draws)
        return torch.from_numpy(np.stack([self._patches.mask_patches(generator) for generator in generators]))


def build_masking(
    objectives: Mapping[str, Objective], tokenizer: SentencePieceTokenizer, shape: M2EncoderConfig
) -> BatchMasking | None:
    """The masking that the active objectives request; None if none does.

    Raises:
        UserError: if their requests differ.
    """
    wanted: dict[str, Any] = {}
    for key in ("word_ratio", "patch_ratio", "user_dictionary"):
        values = {
            name: getattr(objective, key)
            for name, objective in active(objectives).items()
            if isinstance(objective, LocalObjective) and getattr(objective, key) is not None
        }
        if len(set(values.values())) > 1:
            given = ", ".join(f"{name} {value}" for name, value in values.items())
            raise UserError(f"objectives want different {key} ({given}); they share one masked pass: give all the same")
        wanted[key] = next(iter(values.values()), None)
    if wanted["word_ratio"] is None and wanted["patch_ratio"] is None:
        return None
    return BatchMasking(tokenizer, grid=shape.image_size // shape.patch_size, **wanted)
