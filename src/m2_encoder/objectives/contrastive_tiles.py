"""Tiles of the logit matrix: sums of its exponentials and its products with features, never the matrix itself.

Letters: N queries, K keys, E feature dim. Logits are S = s * queries @ keys.T, with s = exp(logit_scale).

Exponentials are taken at one constant shift, exp(S - shift), which serves rows and columns with a single exponential.
Normalised features have |S| <= s, so nothing overflows for any s; sums may underflow only at s > 70 for a row without
any logit near the shift. `in_range` finds that out, and the slower functions with a maximum per row take over.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
from torch import Tensor

_LARGEST_EXPONENT: Final = 70.0
"""exp(70) times 100 million columns is still an fp32 number."""
_SMALLEST_LOG_SUM: Final = -60.0
"""Of a sum at the shift: exponentials that fp32 rounds to zero, below exp(-87), are then 1e-11 of it."""
_TILE_CPU: Final = (1024, 1024)
_TILE_GPU: Final = (8192, 4096)


class Tiles:
    """Walks over the logits of queries and keys.

    Args:
        scale: s, (), of the dtype that sums are accumulated in (fp32 or fp64).
    """

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale
        self.shift = (scale - _LARGEST_EXPONENT).clamp_min(0)
        on_cpu = scale.device.type == "cpu"
        self._has_shift = not on_cpu or bool(self.shift > 0)  # no synchronisation with an accelerator
        self._known_scale = float(scale) if on_cpu else None
        self._sides = _TILE_CPU if on_cpu else _TILE_GPU
        self._scratch: list[Tensor] = []

    def exp_sums(self, queries: Tensor, keys: Tensor, row_sums: Tensor, column_sums: Tensor | None = None) -> None:
        """Add sum_j exp(S_ij - shift) to `row_sums` (N,), and the sums over i to `column_sums` (K,)."""
        for rows, columns, logits in self._logits(queries, keys):
            tile = self._exp(logits)
            row_sums[rows] += tile.sum(dim=1)
            if column_sums is not None:
                column_sums[columns] += tile.sum(dim=0)

    def logsumexps(self, queries: Tensor, keys: Tensor, row_lse: Tensor, column_lse: Tensor | None = None) -> None:
        """As `exp_sums` for any logits: fold the tiles' logsumexps into `row_lse` (N,) and `column_lse` (K,)."""
        for rows, columns, logits in self._logits(queries, keys):
            row_lse[rows] = torch.logaddexp(row_lse[rows], logits.logsumexp(dim=1))
            if column_lse is not None:
                column_lse[columns] = torch.logaddexp(column_lse[columns], logits.logsumexp(dim=0))

    def in_range(self, *lse: Tensor) -> bool:
        """Whether exp(S - shift) is exact enough for rows and columns of these logsumexps; one synchronisation."""
        above = [values - self.shift for values in lse if values.numel()]
        return bool(torch.stack([((v > _SMALLEST_LOG_SUM) & v.isfinite()).all() for v in above]).all())

    def add_products(
        self,
        queries: Tensor,
        keys: Tensor,
        *,
        query_side: Softmax,
        key_side: Softmax,
        query_grad: Tensor,
        key_grad: Tensor | None = None,
        in_range: bool,
    ) -> None:
        """Add P @ keys to `query_grad`, and P.T @ queries to `key_grad`.

        P_ij = query_side.weight_i * exp(S_ij - query_side.lse_i) + key_side.weight_j * exp(S_ij - key_side.lse_j):
        the probabilities of both softmaxes, weighted by their rows' shares in the loss.

        Args:
            queries: (N, E).
            keys: (K, E).
            query_side: softmax over the keys, one per query.
            key_side: softmax over (at least) these queries, one per key.
            query_grad: (N, E), in the dtype of the scale.
            key_grad: (K, E), likewise; None leaves it out.
            in_range: what `in_range` said of all these logsumexps.
        """
        query_factor, key_factor = query_side.factor(self.shift), key_side.factor(self.shift)
        for rows, columns, logits in self._logits(queries, keys):
            if in_range:
                tile = self._exp(logits)
                factor = self._view(1, *tile.shape)
                torch.add(query_factor[rows, None], key_factor[None, columns], out=factor)
                tile.mul_(factor)
            else:
                by_row, by_column = query_side.part(rows), key_side.part(columns)
                tile = by_row.weight[:, None] * (logits - by_row.lse[:, None]).exp_()
                tile += by_column.weight[None] * (logits - by_column.lse[None]).exp_()
            _add_product(query_grad[rows], tile, keys[columns])
            if key_grad is not None:
                _add_product(key_grad[columns], tile.t(), queries[rows])

    def _logits(self, queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Tiles of S with their places; each is overwritten by the next."""
        for rows in _blocks(queries.shape[0], self._sides[0]):
            own = queries[rows] if _multiplies_in_half(queries) else queries[rows].to(self.scale.dtype)
            for columns in _blocks(keys.shape[0], self._sides[1]):
                yield rows, columns, self._product(own, keys[columns])

    def _product(self, queries: Tensor, keys: Tensor) -> Tensor:
        if _multiplies_in_half(queries):
            return _half_product(queries, keys.t()).mul_(self.scale)
        logits, keys = self._view(0, queries.shape[0], keys.shape[0]), keys.to(queries.dtype).t()
        if self._known_scale is None:
            return torch.mm(queries, keys, out=logits).mul_(self.scale)
        return torch.addmm(logits, queries, keys, beta=0, alpha=self._known_scale, out=logits)

    def _exp(self, logits: Tensor) -> Tensor:
        return (logits.sub_(self.shift) if self._has_shift else logits).exp_()

    def _view(self, index: int, height: int, width: int) -> Tensor:
        """Scratch memory, allocated once: tiles of fresh memory would cost more in page faults than in arithmetic."""
        while len(self._scratch) <= index:
            self._scratch.append(self.scale.new_empty(0))
        if self._scratch[index].numel() < height * width:
            self._scratch[index] = self.scale.new_empty(height * width)
        return self._scratch[index][: height * width].view(height, width)


class Softmax(NamedTuple):
    """The softmaxes of one side."""

    lse: Tensor  # logsumexp of each row's logits, (N,)
    weight: Tensor  # share of each row's loss, (N,)

    def factor(self, shift: Tensor) -> Tensor:
        """What turns exp(S - shift) into weighted probabilities, (N,)."""
        return self.weight * (shift - self.lse).exp()

    def part(self, rows: slice) -> Softmax:
        """Some of them."""
        return Softmax(self.lse[rows], self.weight[rows])


def _blocks(length: int, side: int) -> Iterator[slice]:
    for start in range(0, length, side):
        yield slice(start, min(start + side, length))


def _multiplies_in_half(features: Tensor) -> bool:
    """Tensor cores take bf16 and accumulate in fp32; fp16 has too little range for probabilities."""
    return features.is_cuda and features.dtype == torch.bfloat16


def _half_product(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right, out_dtype=torch.float32)


def _add_product(total: Tensor, weights: Tensor, values: Tensor) -> None:
    """Add weights @ values to `total`, accumulated in the dtype of `total`."""
    if not _multiplies_in_half(values):
        total.addmm_(weights, values.to(weights.dtype))
        return
    # Targets are subtracted later, and of a probability near 1, rounded to bf16, nothing true would be left: two parts
    # keep 16 bits.
    rounded = weights.to(values.dtype)
    total += _half_product(rounded, values)
    total += _half_product(weights.sub(rounded).to(values.dtype), values)
