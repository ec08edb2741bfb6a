"""Texts of a batch as one row of tokens without padding.

Only attention needs a rectangle; norms, projections and feed-forward networks, which cost nearly everything, treat each
token alone. A batch of captions of 6 to 24 tokens then costs its mean of 15 tokens, not the 24 of the longest.

Letters: B texts · T tokens of the longest · M tokens in all · H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


class UnpaddedText:
    """Places of the row's tokens. The first tokens of all texts come first, then the second ones, and so on.

    Args:
        token_mask: True on tokens, (B, T) bool.

    Attributes:
        token_mask: the mask in the row's order, (1, M). First tokens are kept even if masked, because the heads read
            them.
        texts: which text each token belongs to, (M,) int64; the first B of them are 0, 1, ..., B - 1.
    """

    def __init__(self, token_mask: Tensor) -> None:
        self.batch_size, self.length = token_mask.shape
        self.key_mask = token_mask[:, None, None, :]
        # (T, B) order: the heads read the first B tokens.
        kept = token_mask.t().clone()
        kept[0] = True
        position, self.texts = kept.nonzero(as_tuple=True)
        self.places = self.texts * self.length + position
        self.slots = torch.zeros(token_mask.numel(), dtype=torch.int64, device=token_mask.device)
        self.slots[self.places] = torch.arange(len(self.places), device=token_mask.device)
        self.token_mask = token_mask.flatten()[self.places].unsqueeze(0)

    def strip(self, x: Tensor) -> Tensor:
        """(B, T, D) to (1, M, D)."""
        return x.flatten(0, 1).index_select(0, self.places).unsqueeze(0)

    def pad(self, x: Tensor) -> Tensor:
        """(1, M, D) to (B, T, D); padding holds some token's values."""
        return x[0].index_select(0, self.slots).unflatten(0, (self.batch_size, self.length))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, more: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Attention within each text.

        Args:
            q: (1, H, M, head_dim), or (1, H, B, head_dim) to attend from the first tokens alone.
            k: (1, H, M, head_dim).
            v: (1, H, M, head_dim).
            more: keys and values for all tokens of all texts, as `append_keys` takes them.

        Returns:
            The shape of q.
        """
        k, v, mask = append_keys(self._pad(k), self._pad(v), self.key_mask, more)
        if q.shape[2] == self.batch_size:
            first = functional.scaled_dot_product_attention(q.transpose(0, 2), k, v, attn_mask=mask)
            return first.transpose(0, 2)
        attended = functional.scaled_dot_product_attention(self._pad(q), k, v, attn_mask=mask)
        return attended.transpose(1, 2).flatten(0, 1).index_select(0, self.places).transpose(0, 1).unsqueeze(0)

    def _pad(self, heads: Tensor) -> Tensor:
        """(1, H, M, head_dim) to (B, H, T, head_dim); padding holds some token's values, which the mask hides."""
        rectangle = heads[0].transpose(0, 1).index_select(0, self.slots)
        return rectangle.unflatten(0, (self.batch_size, self.length)).transpose(1, 2)


def append_keys(
    k: Tensor, v: Tensor, mask: Tensor | None, more: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask of an attention, with keys that every query may look at behind the others.

    Args:
        k: (B, H, T, head_dim).
        v: (B, H, T, head_dim).
        mask: True where a query may look at a key, broadcastable to (B, H, queries, T) bool; None for everywhere.
        more: keys and values, (1, H, P, head_dim) each; None for none.
    """
    if more is None:
        return k, v, mask
    k, v = (
        torch.cat([own, each.expand(own.shape[0], -1, -1, -1)], dim=2) for own, each in zip((k, v), more, strict=True)
    )
    return k, v, None if mask is None else functional.pad(mask, (0, more[0].shape[2]), value=True)


def has_padding(mask: Tensor) -> bool:
    """Whether there is padding to leave out; always False in compiled graphs, whose shapes must not depend on data."""
    return not (torch.compiler.is_compiling() or mask.is_meta or bool(mask.all()))
