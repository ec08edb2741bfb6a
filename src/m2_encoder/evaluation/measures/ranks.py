"""Exact ranks of right items, both ways in one pass over the similarities, a tile of them at a time.

The rank of a query is that of its best right item. It is pessimistic: a wrong item with the same score ranks before the
right one, so a model that gives all items the same feature scores 0.

Similarities are computed once, in fp32. The few that are nearer to the best right one than fp32 can tell are computed
again in fp64, so that ranks are those of fp64, for half of the time and memory.

A gallery in parts, on several ranks or on disk: `Comparison` has what parts must exchange as attributes; the largest
of `best` and `largest`, then the sums of `ahead` and `ties`, are those of the whole.

Letters: Q queries · M gallery items · P pairs of a query and a right item · E feature dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

CHUNK_SIZE: Final = 1024
"""Rows of either side that are compared at once; a tile of similarities has 4 MiB."""

# Scores closer than this (times both norms) tie: products round differently from column to column, in fp64 by less
# than 1e-14.
_TIE_TOLERANCE: Final = 1e-12
_PAIRS_AT_ONCE: Final = 512
_USUAL_EXPONENT: Final = 16
_DENSE: Final = 64  # from one close score in so many, a whole tile in fp64 is cheaper than its close pairs


class Ranks(NamedTuple):
    """Ranks of all queries of one direction, on the CPU."""

    ranks: Tensor  # of the best right item, from 1, (Q,) int64; M + 1 where no right item has a finite score
    ties: Tensor  # wrong items that tie with it, all counted before it, (Q,) int64
    num_gallery: int  # M

    def hits(self, k: int) -> Tensor:
        """Whether a right item is among the first k, (Q,) bool."""
        return self.ranks <= min(k, self.num_gallery)

    def recall(self, k: int) -> float:
        """Percent of the queries with a right item among the first k."""
        return percent(self.hits(k))

    def of(self, queries: Tensor) -> Ranks:
        """Those of some queries: (Q,) bool or rows, int64."""
        return self._replace(ranks=self.ranks[queries], ties=self.ties[queries])

    @property
    def tie_share(self) -> float:
        """Percent of the queries whose best right item ties with a wrong one."""
        return percent(self.ties > 0)

    def luckiest(self) -> Ranks:
        """The same if every tie went in favour of the model; what a sort that leaves ties open can show at best."""
        return self._replace(ranks=self.ranks - self.ties)


def rank_queries(queries: Tensor, gallery: Tensor, pairs: Tensor, *, chunk_size: int = CHUNK_SIZE) -> Ranks:
    """Ranks of the best right items of queries.

    A feature that is not finite is never ahead and never right.

    Args:
        queries: (Q, E), any floating dtype.
        gallery: (M, E), same device.
        pairs: rows of a query and of an item that is right for it, (P, 2) int64. Of several, the best counts, and the
            others do not push it back. A query without one gets the rank M + 1.
        chunk_size: rows of either side that are compared at once.
    """
    comparison = Comparison(queries, gallery, pairs, chunk_size=chunk_size)
    comparison.count(both_ways=False)
    return comparison.rows.ranks(len(gallery))


def rank_both_ways(
    rows: Tensor,
    columns: Tensor,
    pairs: Tensor,
    back_pairs: Tensor | None = None,
    *,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Ranks, Ranks]:
    """Ranks of columns for each row, and of rows for each column, as `rank_queries`; every similarity computed once.

    `back_pairs` are (P', 2) of a column and a row; by default `pairs` the other way round.
    """
    comparison = Comparison(rows, columns, pairs, back_pairs, chunk_size=chunk_size)
    comparison.count()
    return comparison.rows.ranks(len(columns)), comparison.columns.ranks(len(rows))


class Side:
    """One side of a comparison; its items are queries for the other.

    Attributes:
        features: (N, E), any floating dtype.
        pairs: own row and right row of the other side, (P, 2) int64.
        norms: of the features, (N,) fp64; 0 where one is not finite.
        largest: largest norm, () fp64.
        best: highest score of right items, (N,) fp64; -inf where there is none.
        ahead: wrong items that score at least `best`, (N,) int64.
        ties: those of them that tie with it, (N,) int64.
    """

    def __init__(self, features: Tensor, pairs: Tensor, *, chunk_size: int) -> None:
        self.features, self.pairs = features, pairs
        norms = features.new_empty(len(features), dtype=torch.float64)
        for span in _spans(len(features), chunk_size):
            norms[span] = torch.linalg.vector_norm(features[span], dim=1, dtype=torch.float64)
        self._broken = ~norms.isfinite()
        self._any_broken = bool(self._broken.any())
        self.norms = norms.masked_fill(self._broken, 0.0)
        self.largest = self.norms.max() if len(norms) else norms.new_zeros(())
        # A power of two changes no digit, and keeps products of very small or large features in the range of fp32.
        exponent = math.floor(math.log2(float(self.largest))) if self.largest else 0
        self.scale = 2.0**-exponent if abs(exponent) > _USUAL_EXPONENT else 1.0
        self.best = torch.full_like(norms, -math.inf)
        self.ahead = torch.zeros_like(norms, dtype=torch.long)
        self.ties = torch.zeros_like(self.ahead)
        self._codes = norms.new_empty(0)

    def find_best(self, scores: Tensor, num_other: int) -> None:
        """Finds `best` among the exact scores of `pairs`, (P,) fp64."""
        scores = scores.masked_fill(~scores.isfinite(), -math.inf)
        self.best.scatter_reduce_(0, self.pairs[:, 0], scores, "amax")
        self._codes = (self.pairs[:, 0] * num_other + self.pairs[:, 1]).unique()

    def tile(self, span: slice) -> Tensor:
        """Some features in fp32, times `scale`; NaN, which is never ahead, where one is not finite."""
        part = self.features[span]
        if self.scale != 1.0:
            part = part.to(torch.promote_types(part.dtype, torch.float32)) * self.scale
        part = part.float()
        return part.masked_fill(self._broken[span, None], math.nan) if self._any_broken else part

    def bounds(self, span: slice, other: Side) -> tuple[Tensor, Tensor]:
        """Scores of tiles below which no item is ahead, and above which every one is, each (n,) fp32."""
        # |fl(q.g) - q.g| <= n u / (1 - n u) |q| |g| (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), in
        # any order of summation; 8 more for the roundings to fp32. The last term is for what underflows.
        dim = self.features.shape[1]
        unit = 2.0**-24
        error = (dim + 8) * unit / (1 - (dim + 8) * unit)
        scale = self.scale * other.scale
        margin = error * self.norms[span] * other.largest * scale + (dim + 8) * 2.0**-100
        best = self.best[span] * scale
        return (best - margin).float(), (best + margin).float()

    def tolerance(self, other: Side) -> Tensor:
        """Difference of scores up to which they tie, (N,) fp64."""
        return self.norms * other.largest * _TIE_TOLERANCE

    def is_right(self, pairs: Tensor, num_other: int) -> Tensor:
        """Whether pairs are among the right ones, (n, 2) int64 to (n,) bool."""
        if not len(self._codes):
            return torch.zeros(len(pairs), dtype=torch.bool, device=pairs.device)
        codes = pairs[:, 0] * num_other + pairs[:, 1]
        places = torch.searchsorted(self._codes, codes).clamp_(max=len(self._codes) - 1)
        return self._codes[places] == codes

    def ranks(self, num_gallery: int) -> Ranks:
        """What was counted."""
        found = self.best.isfinite()
        ranks = torch.where(found, self.ahead + 1, num_gallery + 1)
        return Ranks(ranks.cpu(), self.ties.where(found, 0).cpu(), num_gallery)


class Comparison:
    """Compares all rows with all columns.

    Args:
        rows: (Q, E), any floating dtype.
        columns: (M, E), same device.
        pairs: row and right column, (P, 2) int64.
        back_pairs: column and right row, (P', 2) int64; by default the same pairs.
        chunk_size: rows and columns of a tile.
    """

    def __init__(
        self,
        rows: Tensor,
        columns: Tensor,
        pairs: Tensor,
        back_pairs: Tensor | None = None,
        *,
        chunk_size: int = CHUNK_SIZE,
    ) -> None:
        if rows.device.type == "mps":  # has no fp64
            rows, columns = rows.cpu(), columns.cpu()
        rows, columns, pairs = rows.detach(), columns.detach(), pairs.to(rows.device)
        back = pairs.flip(1) if back_pairs is None else back_pairs.to(rows.device)
        self._chunk_size = chunk_size
        self.rows = Side(rows, pairs, chunk_size=chunk_size)
        self.columns = Side(columns, back, chunk_size=chunk_size)
        scores = exact_scores(rows, columns, pairs)
        self.rows.find_best(scores, len(columns))
        self.columns.find_best(scores if back_pairs is None else exact_scores(columns, rows, back), len(rows))

    def count(self, *, both_ways: bool = True) -> None:
        """Counts who is ahead of the best right item of each row, and of each column."""
        with full_precision(self.rows.features.device):
            for own in _spans(len(self.rows.features), self._chunk_size):
                left = self.rows.tile(own)
                for others in _spans(len(self.columns.features), self._chunk_size):
                    scores = multiply(left, self.columns.tile(others))
                    self._count_tile(scores, own, others)
                    if both_ways:
                        self._count_tile(scores, own, others, of_columns=True)

    def _count_tile(self, scores: Tensor, rows: slice, columns: slice, *, of_columns: bool = False) -> None:
        """Counts in a tile for its rows, or for its columns."""
        own, other, span = (self.columns, self.rows, columns) if of_columns else (self.rows, self.columns, rows)
        low, high = (bound[None] if of_columns else bound[:, None] for bound in own.bounds(span, other))
        ahead = scores > high  # no right item is among them: none scores more than the best
        close = (scores >= low) ^ ahead
        own.ahead[span] += ahead.sum(dim=0 if of_columns else 1, dtype=torch.int32)
        pairs = _find_true(close) + torch.tensor([[rows.start, columns.start]], device=close.device)
        if len(pairs) * _DENSE > close.numel():
            _settle_tile(own, other, close.t() if of_columns else close, span, rows if of_columns else columns)
        else:
            _settle_pairs(own, other, pairs.flip(1) if of_columns else pairs)


def _find_true(mask: Tensor) -> Tensor:
    """Places of what is true, (n, 2) int64: as `nonzero`, which is slow where little is; looks at eight at a time."""
    if mask.shape[1] % 8:
        return mask.nonzero()
    words = mask.view(torch.int64).nonzero()
    found = mask.view(len(mask), -1, 8)[words[:, 0], words[:, 1]].nonzero()
    rows, first = words[found[:, 0]].unbind(1)
    return torch.stack([rows, 8 * first + found[:, 1]], dim=1)


def _settle_pairs(own: Side, other: Side, pairs: Tensor) -> None:
    """Decides on pairs whose scores are close to the best right one."""
    tolerance = own.tolerance(other)
    pairs = pairs[~own.is_right(pairs, len(other.features))]
    for part in pairs.split(_PAIRS_AT_ONCE):
        rows = part[:, 0]
        distance = exact_scores(own.features, other.features, part) - own.best[rows]
        own.ahead.index_add_(0, rows, (distance >= -tolerance[rows]).long())
        own.ties.index_add_(0, rows, (distance.abs() <= tolerance[rows]).long())


def _settle_tile(own: Side, other: Side, close: Tensor, span: slice, others: slice) -> None:
    """The same where most of a tile is close, as with a model that gives all items the same feature."""
    exact = own.features[span].double() @ other.features[others].double().t()
    exact.masked_fill_(~close, math.nan)
    rows, columns = own.pairs.unbind(1)
    inside = (rows >= span.start) & (rows < span.stop) & (columns >= others.start) & (columns < others.stop)
    exact[rows[inside] - span.start, columns[inside] - others.start] = math.nan
    distance = exact - own.best[span, None]
    tolerance = own.tolerance(other)[span, None]
    own.ahead[span] += (distance >= -tolerance).sum(dim=1, dtype=torch.int32)
    own.ties[span] += (distance.abs() <= tolerance).sum(dim=1, dtype=torch.int32)


def exact_scores(rows: Tensor, columns: Tensor, pairs: Tensor) -> Tensor:
    """Inner products of pairs of rows in fp64: (Q, E), (M, E), (P, 2) to (P,); equal features give equal bits."""
    # Filled in place: small results between large temporary tensors keep the heap from being used again.
    found = rows.new_empty(len(pairs), dtype=torch.float64)
    for span in _spans(len(pairs), _PAIRS_AT_ONCE):
        part = pairs[span]
        found[span] = (rows[part[:, 0]].double() * columns[part[:, 1]].double()).sum(dim=1)
    return found


def multiply(rows: Tensor, columns: Tensor) -> Tensor:
    """All inner products of two tiles in fp32: (r, E), (c, E) to (r, c).

    On a CPU by oneDNN, which torch asks only for tensors of its own kind: MKL, which torch asks otherwise, takes twice
    as long on processors that its maker did not make.
    """
    if rows.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return linear(rows.to_mkldnn(), columns).to_dense()
    return rows @ columns.t()


def percent(hits: Tensor) -> float:
    """Share of what is true, in percent."""
    return 100.0 * float(hits.double().mean())


def _spans(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products in fp32 as they are, without autograd, whatever a training run allows its own."""
    backends = (
        torch.backends.cuda.matmul,
        torch.backends.mkldnn.matmul,  # type: ignore[attr-defined,unused-ignore]
    )
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
