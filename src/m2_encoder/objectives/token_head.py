"""The head of masked language modelling and captioning: from hidden states to losses of tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.objectives.base import LocalTerms
from m2_encoder.objectives.passes import PiecePasses

_INIT_STD = 0.02


class TokenHead(nn.Module):
    """s = LN(GELU(W h + b)), then the cross-entropy of s against a table of tokens.

    Args:
        shape: of the model.
        decoder: "tied" compares with the model's token table, "own" with a table of this head.

    Reference: BERT (arXiv:1810.04805), section 3.1; tied tables: arXiv:1608.05859.
    """

    def __init__(self, shape: M2EncoderConfig, *, decoder: Literal["tied", "own"] = "tied") -> None:
        super().__init__()
        self.transform = nn.Linear(shape.embed_dim, shape.embed_dim)
        self.norm = nn.LayerNorm(shape.embed_dim)
        self.bias = nn.Parameter(torch.zeros(shape.vocab_size))
        self.table = nn.Parameter(torch.empty(shape.vocab_size, shape.embed_dim)) if decoder == "own" else None
        for weight in (self.transform.weight, self.table):
            if weight is not None:
                nn.init.normal_(weight, std=_INIT_STD)
        nn.init.zeros_(self.transform.bias)

    def terms(self, hidden: Tensor, targets: Tensor, predicted: Tensor, passes: PiecePasses) -> LocalTerms:
        """Losses of the predicted tokens, summed by caption.

        Args:
            hidden: of the predicted tokens, row by row, (M, D).
            targets: true ids, (k * b, T) int64.
            predicted: which tokens of the captions these are, (k * b, T) bool.
            passes: for the model's token table.

        Returns:
            Terms with the score "accuracy": how many targets scored highest.
        """
        rows, places = predicted.nonzero(as_tuple=True)
        losses, hits = passes.token_losses(self._states(hidden), self.bias, targets[rows, places], self.table)
        sums = losses.new_zeros(len(predicted)).index_add(0, rows, losses)
        correct = torch.zeros_like(sums).index_add(0, rows, hits.to(sums.dtype))
        return LocalTerms(sums, predicted.sum(dim=1), {"accuracy": correct.detach()})

    def predict(self, hidden: Tensor, table: Tensor) -> Tensor:
        """The token of the highest score for each state, (M, D) to (M,) int64; arguments as in `logits`."""
        return self.logits(hidden, table).argmax(1)

    def logits(self, hidden: Tensor, table: Tensor) -> Tensor:
        """Scores of all tokens for each state, (M, D) to (M, V).

        Args:
            hidden: (M, D).
            table: the model's token table, (V, D); not used if this head has its own.
        """
        table = table if self.table is None else self.table
        return functional.linear(self._states(hidden), table) + self.bias

    def _states(self, hidden: Tensor) -> Tensor:
        return self.norm(functional.gelu(self.transform(hidden)))
