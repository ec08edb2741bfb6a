"""Somebody else's tokenizer: any callable from texts to ids, such as open_clip's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from m2_encoder.errors import UserError
from m2_encoder.types import TextTokens


class ForeignTokenizer:
    """Texts to ids and mask by a callable, which may return ids, (B, T); ids and mask; or a mapping with `input_ids`.

    Args:
        tokenize: called with a list of texts.
        name: of it, for messages.

    Raises:
        UserError: if it makes something else of two texts.
    """

    def __init__(self, tokenize: Callable[[list[str]], Any], name: str) -> None:
        if not callable(tokenize):
            raise UserError(f"makes {type(tokenize).__name__}, which cannot be called with texts", key="_target_")
        self._tokenize, self.name = tokenize, name
        self(["a cat", "一只猫"])

    @property
    def vocab_size(self) -> int | None:
        """Number of ids, if the callable says it."""
        size = getattr(self._tokenize, "vocab_size", None)
        return size if isinstance(size, int) else None

    def __call__(self, texts: Sequence[str]) -> TextTokens:
        """Ids and mask, (B, T) each; without a mask of its own all ids are tokens, whatever they pad."""
        made = self._tokenize(list(texts))
        if isinstance(made, Mapping):
            made = made.get("input_ids"), made.get("attention_mask")
        ids, mask = made if isinstance(made, tuple | list) and len(made) == 2 else (made, None)
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.ndim != 2 or len(ids) != len(texts):
            what = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
            rule = f"gives {what} for {len(texts)} texts; it must give whole numbers, ({len(texts)}, T), with a mask"
            raise UserError(f"{rule} or alone", key="_target_", value=self.name)
        return TextTokens(ids.long(), torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool())
