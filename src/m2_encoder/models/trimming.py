"""Checks of token ids, and removal of padding beyond the longest text of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from m2_encoder.errors import UserError
from m2_encoder.types import TextTokens


def trim_text(text: TextTokens | Tensor, mask: Tensor | None, *, vocab_size: int, max_tokens: int) -> TextTokens:
    """Check texts and cut padding beyond the longest of the batch.

    Args:
        text: tokens, or ids alone, (B, T).
        mask: with ids alone: non-zero on tokens, (B, T), any dtype; None means no padding.
        vocab_size: V; ids are below it.
        max_tokens: of a text.

    Returns:
        ids int64 and mask bool, (B, longest).

    Raises:
        UserError: for ids outside the token table, a text without tokens, or a text beyond the position table. On an
            accelerator the check costs one synchronisation.
    """
    if isinstance(text, tuple):
        if mask is not None:
            raise UserError("give the mask inside TextTokens or beside the ids, not both")
        ids, mask = text
    else:
        ids = text
    if not isinstance(ids, Tensor):
        raise UserError(f"texts are {type(ids).__name__}, expected token ids: encode_text(tokenizer(texts))")
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise UserError(f"text ids are {ids.dtype} of shape {tuple(ids.shape)}, expected whole numbers (B, T)")
    if mask is None:
        mask = torch.ones_like(ids, dtype=torch.bool)
    mask = mask.bool()
    if mask.shape != ids.shape:
        raise UserError(f"text mask has shape {tuple(mask.shape)}, the ids have {tuple(ids.shape)}")
    if ids.numel() == 0 and ids.shape[0] == 0:
        return TextTokens(ids.long(), mask)
    if ids.device.type == "meta":
        return TextTokens(ids, mask)
    longest = _check_text(ids, mask, vocab_size=vocab_size, max_tokens=max_tokens)
    return TextTokens(ids[:, :longest].long(), mask[:, :longest])


def _check_text(ids: Tensor, mask: Tensor, *, vocab_size: int, max_tokens: int) -> int:
    """Length of the longest text; refuses ids and lengths beyond the tables."""
    if ids.shape[1] == 0:
        raise UserError("texts have no tokens at all; the tokenizer always adds two special ones")
    # The place of the last token, counted from 1; 0 without any.
    lengths = (torch.arange(1, mask.shape[1] + 1, device=mask.device) * mask).amax(dim=1)
    longest, shortest, highest, lowest = torch.stack([lengths.amax(), lengths.amin(), ids.amax(), ids.amin()]).tolist()
    if shortest == 0:
        raise UserError("a text of the batch is all padding; every text needs at least one token in its mask")
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise UserError(
            f"token id {wrong} is outside 0..{vocab_size - 1}; "
            "was the text tokenized with the tokenizer of another model?"
        )
    if longest > max_tokens:
        raise UserError(f"a text has {longest} tokens, the position table holds {max_tokens}; truncate it")
    return int(longest)
