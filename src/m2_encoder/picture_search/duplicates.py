"""Near-equal pictures of an index, by their features.

Letters: N pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import torch

from m2_encoder.curation.split_groups import find_root, join
from m2_encoder.evaluation.measures.ranks import full_precision, multiply
from m2_encoder.picture_search.index import PictureIndex

_TILE_ROWS: Final = 2048
_ROUNDING: Final = 1e-6  # of a cosine in float32


class Group(NamedTuple):
    """Pictures that are near-equal, each to another one of them."""

    rows: list[int]  # of the index, the largest file first
    least: float  # cosine of the first one with the farthest of the others


def find_duplicates(
    index: PictureIndex,
    threshold: float,
    *,
    report: Callable[[int, int], object] = lambda done, total: None,
) -> list[Group]:
    """Groups of near-equal pictures, the most similar first; all pairs are compared.

    Args:
        index: open.
        threshold: cosine from which on two pictures are near-equal.
        report: is told how many of N pictures are done.
    """
    parents = list(range(len(index)))
    report(0, len(index))
    for start in range(0, len(index), _TILE_ROWS):
        tile = _read(index, start)
        for other in range(start, len(index), _TILE_ROWS):
            with full_precision(torch.device("cpu")):
                near = (multiply(tile, _read(index, other)) >= threshold - _ROUNDING).nonzero()
            pairs = near[near[:, 0] + start < near[:, 1] + other]
            for first, second in pairs.tolist():
                join(parents, first + start, second + other)
        report(min(start + _TILE_ROWS, len(index)), len(index))
    groups: dict[int, list[int]] = {}
    for row in range(len(index)):
        groups.setdefault(find_root(parents, row), []).append(row)
    found = [_make(index, rows) for rows in groups.values() if len(rows) > 1]
    return sorted(found, key=lambda group: (-group.least, group.rows))


def _read(index: PictureIndex, start: int) -> torch.Tensor:
    rows = torch.from_numpy(np.asarray(index.features[start : start + _TILE_ROWS], dtype=np.float32))
    return torch.nn.functional.normalize(rows, dim=1)  # float16 has rounded them


def _make(index: PictureIndex, rows: list[int]) -> Group:
    rows = sorted(rows, key=lambda row: (-int(index.sizes[row]), row))
    features = np.asarray(index.features[rows], dtype=np.float64)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return Group(rows, min(1.0, float((features @ features[0]).min())))
