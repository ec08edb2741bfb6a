"""Ranks of one pass in fp32 are those of brute force in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from m2_encoder.evaluation.measures.ranks import Comparison, Ranks, rank_both_ways, rank_queries


def brute_force(queries: Tensor, gallery: Tensor, pairs: Tensor) -> tuple[list[int], list[int]]:
    """Ranks and ties from all similarities in fp64, by definition."""
    queries, gallery = queries.double(), gallery.double()
    scores = queries @ gallery.t()
    right = torch.zeros_like(scores, dtype=torch.bool)
    right[pairs[:, 0], pairs[:, 1]] = True
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    tolerance = 1e-12 * queries.norm(dim=1, keepdim=True) * gallery.norm(dim=1).max()
    ahead = (scores >= best - tolerance) & ~right
    ties = ahead & (scores <= best + tolerance)
    ranks = torch.where(right.any(dim=1), ahead.sum(dim=1) + 1, len(gallery) + 1)
    return ranks.tolist(), ties.sum(dim=1).where(right.any(dim=1), 0).tolist()


def found(ranks: Ranks) -> tuple[list[int], list[int]]:
    return ranks.ranks.tolist(), ranks.ties.tolist()


def make_sides(*, noise: float, size: int = 300, dim: int = 96) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Texts and images of a model that has learnt something, and other pairs for the way back."""
    images = torch.nn.functional.normalize(torch.randn(size, dim), dim=1)
    texts = torch.nn.functional.normalize(images.repeat(2, 1) + noise * torch.randn(2 * size, dim), dim=1)
    pairs = torch.stack([torch.arange(2 * size), torch.arange(2 * size) % size], dim=1)
    extra = torch.randint(0, size, (50, 2))
    return texts, images, torch.cat([pairs, extra]), pairs.flip(1)[size // 2 :]


@pytest.mark.parametrize("noise", [0.02, 0.3, 10.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_both_ways_equal_brute_force(noise: float, dtype: torch.dtype) -> None:
    texts, images, pairs, back = make_sides(noise=noise)
    texts, images = texts.to(dtype), images.to(dtype)
    forward, backward = rank_both_ways(texts, images, pairs, back, chunk_size=128)
    assert found(forward) == brute_force(texts, images, pairs)
    assert found(backward) == brute_force(images, texts, back)


def test_differences_below_fp32_decide() -> None:
    """Wrong items whose scores fp32 cannot tell from the right one, a hair above and below."""
    query = torch.nn.functional.normalize(torch.randn(1, 256, dtype=torch.float64), dim=1)
    steps = torch.tensor([0.0, 3e-10, -3e-10, 5e-9, -5e-9], dtype=torch.float64)[:, None]
    gallery = torch.cat([query * (1 + steps), torch.randn(400, 256, dtype=torch.float64) / 100])
    ranks = rank_queries(query, gallery, torch.tensor([[0, 0]]))
    assert found(ranks) == ([3], [0])
    gallery[2] = gallery[0]
    assert found(rank_queries(query, gallery, torch.tensor([[0, 0]]))) == ([4], [1])
    assert rank_queries(query, gallery, torch.tensor([[0, 0]])).luckiest().ranks.tolist() == [3]


def test_precision_that_a_run_allows_is_not_used() -> None:
    texts, images, pairs, _ = make_sides(noise=0.3)
    expected = brute_force(texts, images, pairs)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert found(rank_queries(texts, images, pairs)) == expected
        assert torch.get_float32_matmul_precision() == "medium"
        torch.backends.mkldnn.matmul.fp32_precision = "tf32"  # the newer of two ways, which must not be mixed
        assert found(rank_queries(texts, images, pairs)) == expected
        assert torch.backends.mkldnn.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_features_of_any_length(factor: float) -> None:
    texts, images, pairs, back = make_sides(noise=0.3)
    texts, images = texts.double() * factor, images.double() * factor
    texts[7] *= 1e-6
    texts[8] *= 1e-20
    forward, backward = rank_both_ways(texts, images, pairs, back)
    assert found(forward) == brute_force(texts, images, pairs)
    assert found(backward) == brute_force(images, texts, back)


@pytest.mark.parametrize("collapsed", [False, True])
def test_parts_of_a_gallery_add_up_to_the_whole(collapsed: bool) -> None:
    texts, images, pairs, _ = make_sides(noise=0.3, size=101)
    if collapsed:
        texts, images = texts[:1].expand(202, -1), texts[:1].expand(101, -1)
    parts = []
    for start in range(0, 101, 40):
        own = pairs[(pairs[:, 1] >= start) & (pairs[:, 1] < start + 40)] - torch.tensor([0, start])
        parts.append(Comparison(texts, images[start : start + 40], own))
    best = torch.stack([part.rows.best for part in parts]).amax(dim=0)
    largest = torch.stack([part.columns.largest for part in parts]).amax()
    for part in parts:
        part.rows.best, part.columns.largest = best, largest
        part.count(both_ways=False)
    whole = rank_queries(texts, images, pairs)
    assert torch.equal(sum(part.rows.ahead for part in parts) + 1, whole.ranks)
    assert torch.equal(sum(part.rows.ties for part in parts), whole.ties)


def test_queries_without_a_right_item_rank_last() -> None:
    ranks = rank_queries(torch.eye(3), torch.eye(3), torch.tensor([[0, 0], [2, 2]]))
    assert ranks.ranks.tolist() == [1, 4, 1]
    assert ranks.of(torch.tensor([0, 2])).recall(1) == 100.0
