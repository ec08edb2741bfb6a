"""Groups of near-equal pictures against all pairs compared one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m2_encoder.picture_search import duplicates as module
from m2_encoder.picture_search.duplicates import find_duplicates
from m2_encoder.picture_search.index import IndexModel, PictureIndex


def make_index(features: Any, sizes: list[int]) -> PictureIndex:
    number = len(features)
    return PictureIndex(
        path=Path("i"), root=Path("p"), names=[f"{row}.png" for row in range(number)], sizes=np.array(sizes),
        times=np.zeros(number, np.int64), features=features, made_by=IndexModel("m", None, None, "standard", ""),
        skipped=[], neighbours=None,
    )  # fmt: skip


def by_hand(features: np.ndarray, threshold: float) -> set[frozenset[int]]:
    groups = [{row} for row in range(len(features))]
    for first in range(len(features)):
        for second in range(first):
            if features[first].astype(np.float64) @ features[second].astype(np.float64) >= threshold:
                merged = next(g for g in groups if first in g) | next(g for g in groups if second in g)
                groups = [g for g in groups if not g & merged] + [merged]
    return {frozenset(group) for group in groups if len(group) > 1}


@pytest.mark.parametrize("tile", [2, 7, 100])
def test_all_pairs_are_compared(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TILE_ROWS", tile)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 6)) + np.repeat(rng.normal(size=(6, 6)) * 3, 5, axis=0)
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
    sizes = rng.integers(1, 5, 30).tolist()
    told: list[tuple[int, int]] = []
    found = find_duplicates(make_index(features, sizes), 0.97, report=lambda done, total: told.append((done, total)))
    expected = by_hand(features, 0.97)
    assert len(expected) >= 3
    assert {frozenset(group.rows) for group in found} == expected
    for group in found:
        assert sizes[group.rows[0]] == max(sizes[row] for row in group.rows)
        assert group.least == pytest.approx(min(features[group.rows].astype(np.float64) @ features[group.rows[0]]))
    assert [group.least for group in found] == sorted((group.least for group in found), reverse=True)
    assert told[-1] == (30, 30)


def test_equal_features_of_float16_are_equal() -> None:
    features = np.random.default_rng(1).normal(size=(5, 512))
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16)
    features[3] = features[1]
    (group,) = find_duplicates(make_index(features, [1, 1, 1, 2, 1]), 1.0)
    assert group.rows == [3, 1]
    assert group.least == pytest.approx(1, abs=1e-6)
