"""The nearest items are those of a full sort."""

from __future__ import annotations

import pytest
import torch

from m2_encoder.evaluation.measures.nearest import find_nearest, merge_nearest


@pytest.mark.parametrize("chunk_size", [7, 64, 10_000])
def test_nearest_equal_a_full_sort(chunk_size: int) -> None:
    queries, gallery = torch.randn(50, 24), torch.randn(230, 24)
    gallery[100:110] = gallery[:10]  # equal scores: the lower row first
    scores = (queries.double()[:, None] * gallery.double()).sum(dim=2)
    order = scores.argsort(dim=1, descending=True, stable=True)
    nearest = find_nearest(queries, gallery, 12, chunk_size=chunk_size)
    assert torch.equal(nearest.rows, order[:, :12])
    assert torch.equal(nearest.scores, scores.gather(1, nearest.rows))
    assert find_nearest(queries, gallery, 1000).rows.shape == (50, 230)


def test_parts_merge_to_the_whole() -> None:
    queries, gallery = torch.randn(31, 16), torch.randn(101, 16)
    gallery[90] = gallery[3]
    parts = [
        find_nearest(queries, gallery[start : start + 40], 10, first_row=start) for start in range(0, len(gallery), 40)
    ]
    whole, merged = find_nearest(queries, gallery, 10), merge_nearest(parts, 10)
    assert torch.equal(merged.rows, whole.rows)
    assert torch.equal(merged.scores, whole.scores)


def test_nothing_to_find_is_refused() -> None:
    with pytest.raises(ValueError, match="k=0 of 3"):
        find_nearest(torch.eye(3), torch.eye(3), 0)
