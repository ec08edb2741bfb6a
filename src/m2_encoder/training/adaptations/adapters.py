"""A small module per language behind each layer, chosen by the caption's language; everything else stays as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import Le, MinLen
from torch import Tensor

from m2_encoder.bounds import Count, check_bounds
from m2_encoder.errors import UserError
from m2_encoder.models.added_parts import add_adapters
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.tokenizers.han_pieces import mark_han_pieces
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from m2_encoder.training.adaptation import Adaptation


class PerLanguage(Adaptation):
    """Trains adapters of text tokens in the backbone and the temperature, and nothing else; pictures stay the same.

    A text with a Chinese character is Chinese, every other one English, whatever its columns say: token ids alone
    decide, in training as in every exported format.

    Args:
        width: hidden width of an adapter.
        languages: whose adapters are trained; features of texts in the other one stay the same to the bit.

    Raises:
        UserError: for an unknown language; in `prepare`, for a tokenizer without a Chinese character; in `apply`, for a
            model that has adapters already.

    Reference: adapters (arXiv:1902.00751); one per language: MAD-X (arXiv:2005.00052), Babel-ImageNet
    (arXiv:2306.08658).
    """

    @check_bounds
    def __init__(
        self,
        width: Annotated[Count, Le(2**16)] = 64,
        languages: Annotated[Sequence[Literal["en", "zh"]], MinLen(1)] = ("en", "zh"),
    ) -> None:
        self._width, self._languages = width, languages
        self._pieces: Tensor | None = None

    def prepare(self, tokenizer: SentencePieceTokenizer) -> None:
        """Find the pieces with Chinese characters."""
        self._pieces = mark_han_pieces(tokenizer)
        if not self._pieces.any():
            raise UserError(
                "adapters tell languages apart by Chinese characters, and the tokenizer has no piece with one; give "
                "another model.tokenizer, or use another adaptation"
            )

    def apply(self, model: M2Encoder) -> None:
        """Freeze the model, and give its layers adapters that change nothing yet."""
        config = model.config
        if config.adapter_width:
            rule = "would replace the adapters that the model has; use the weights before, or adaptation=full"
            raise UserError(rule, key="width", value=self._width)
        model.config = dataclasses.replace(config, adapter_width=self._width)
        model.requires_grad_(False)
        with torch.device(model.logit_scale.device):
            add_adapters(model.backbone, model.config)
            pieces = torch.zeros(config.vocab_size)
        if not pieces.is_meta:  # where only shapes count, no tokenizer is needed
            assert self._pieces is not None, "prepare comes first"
            pieces[: len(self._pieces)] = self._pieces
        model.text_embed.register_buffer("han_pieces", pieces)
        for layer in model.backbone.layers:
            for language in ("en", "zh"):
                getattr(layer.adapters, language).requires_grad_(language in self._languages)
        for scale in model.logit_scales():
            scale.requires_grad_(True)

    def merge(self, model: M2Encoder) -> M2Encoder:
        """Return the model itself: its architecture knows adapters."""
        return model
