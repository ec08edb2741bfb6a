"""Tokens of a batch whose states are read; the others serve only as keys and values.

For them alone the last layer computes queries, the output projection and the feed-forward network, five sixths of its
cost. Masked objectives, for example, read only the states of hidden tokens.

Letters: R rows (captions) · T tokens of a row · M selected tokens in all · C the most of one row.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SelectedTokens:
    """Places of the selected tokens, which are ordered row by row.

    Args:
        selected: True where a state is read, (R, T) bool. On an accelerator this costs two synchronisations.

    Attributes:
        num_rows: R.
        rows: of each selected token, (M,) int64.
        places: of each within its row, (M,) int64.
        table: which selected token each cell of a rectangle holds, (R, C) int64; empty cells hold the first one.
    """

    def __init__(self, selected: Tensor) -> None:
        self.num_rows = selected.shape[0]
        self.rows, self.places = selected.nonzero(as_tuple=True)
        columns = (selected.cumsum(dim=1) - 1)[self.rows, self.places]
        width = int(columns.amax()) + 1 if len(columns) else 0
        self._cells = self.rows * width + columns
        self.table = torch.zeros((self.num_rows * width,), dtype=torch.int64, device=selected.device)
        self.table[self._cells] = torch.arange(len(self.rows), device=selected.device)
        self.table = self.table.unflatten(0, (self.num_rows, width))

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, x: Tensor) -> Tensor:
        """States of the selected tokens, (R / k, T, D) to (M, D); row i of x serves as rows k * i … k * i + k - 1."""
        repeats = self.num_rows // max(1, x.shape[0])
        rows = self.rows if repeats == 1 else self.rows // repeats
        return x.flatten(0, 1).index_select(0, rows * x.shape[1] + self.places)

    def spread(self, x: Tensor) -> Tensor:
        """(M, …) to (R, C, …); empty cells hold the values of the first token."""
        return x.index_select(0, self.table.flatten()).unflatten(0, tuple(self.table.shape))

    def collect(self, x: Tensor) -> Tensor:
        """(R, C, …) to (M, …)."""
        return x.flatten(0, 1).index_select(0, self._cells)
