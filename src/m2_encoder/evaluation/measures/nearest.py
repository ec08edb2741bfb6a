"""The nearest gallery items of each query, exactly, for lists, galleries and neighbours.

Letters: Q queries · M gallery items · E feature dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from m2_encoder.evaluation.measures.ranks import CHUNK_SIZE, exact_scores, full_precision, multiply

# More than asked for, by fp32, before fp64 puts them in order: as long as fewer items are within a rounding error of
# the last one, the first k are those of fp64.
_SPARE: Final = 16


class Nearest(NamedTuple):
    """The first k of each query."""

    rows: Tensor  # of the gallery, best first, (Q, k) int64
    scores: Tensor  # inner products, (Q, k) fp64


def find_nearest(
    queries: Tensor, gallery: Tensor, k: int, *, first_row: int = 0, chunk_size: int = CHUNK_SIZE
) -> Nearest:
    """The k nearest by inner product; of equal scores the lower row comes first.

    Args:
        queries: (Q, E), any floating dtype.
        gallery: (M, E), same device; M may be any size, similarities exist a tile at a time.
        k: at least 1; capped at M.
        first_row: number of the gallery's first row, if it is a part of a larger one; `merge_nearest` joins parts.
        chunk_size: rows of either side that are compared at once.

    Raises:
        ValueError: for a k below 1, or an empty gallery.
    """
    if k < 1 or not len(gallery):
        raise ValueError(f"k={k} of {len(gallery)} gallery items: both must be at least 1")
    found = []
    with full_precision(queries.device):
        for part in queries.split(chunk_size):
            rows = _candidates(part.float(), gallery, k + _SPARE, chunk_size)
            own = torch.arange(len(part), device=rows.device)[:, None].expand_as(rows)
            pairs = torch.stack([own, rows], dim=2).flatten(0, 1)
            scores = exact_scores(part, gallery, pairs).view_as(rows)
            found.append(_first(Nearest(rows + first_row, scores), k))
    return Nearest(torch.cat([part.rows for part in found]), torch.cat([part.scores for part in found]))


def merge_nearest(parts: Sequence[Nearest], k: int) -> Nearest:
    """The k nearest of a gallery from those of its parts, each found with the same k."""
    return _first(
        Nearest(torch.cat([part.rows for part in parts], 1), torch.cat([part.scores for part in parts], 1)), k
    )


def _candidates(queries: Tensor, gallery: Tensor, number: int, chunk_size: int) -> Tensor:
    best: Tensor | None = None
    rows = torch.empty(0)
    start = 0
    for part in gallery.split(chunk_size):
        scores, found = multiply(queries, part.float()).topk(min(number, len(part)), dim=1)
        found += start
        start += len(part)
        if best is None:
            best, rows = scores, found
            continue
        both = torch.cat([best, scores], dim=1)
        best, places = both.topk(min(number, both.shape[1]), dim=1)
        rows = torch.cat([rows, found], dim=1).gather(1, places)
    return rows


def _first(found: Nearest, k: int) -> Nearest:
    order = found.rows.argsort(dim=1, stable=True)
    rows, scores = found.rows.gather(1, order), found.scores.gather(1, order)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return Nearest(rows.gather(1, order), scores.gather(1, order))
