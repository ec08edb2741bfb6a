"""Recall against brute force, and the properties that make it trustworthy."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m2_encoder.evaluation.metrics import (
    chance_recall,
    pairs_of_equal_ids,
    recall_at_k,
    retrieval_metrics,
)


def brute_force_ranks(queries: Tensor, gallery: Tensor, pairs: set[tuple[int, int]]) -> list[int]:
    """Plain Python on exact integers: 1 + wrong items that score at least as high as the best right one."""
    ranks = []
    for q, query in enumerate(queries.tolist()):
        scores = [sum(a * b for a, b in zip(query, item, strict=True)) for item in gallery.tolist()]
        best = max(scores[g] for g in range(len(scores)) if (q, g) in pairs)
        ranks.append(1 + sum(score >= best and (q, g) not in pairs for g, score in enumerate(scores)))
    return ranks


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, set[tuple[int, int]]]:
    """Small integer features, so that ties are frequent and scores exact."""
    num_queries, num_items, width = draw(st.integers(1, 7)), draw(st.integers(1, 9)), draw(st.integers(1, 3))
    value = st.integers(-2, 2)
    features = [
        draw(st.lists(st.lists(value, min_size=width, max_size=width), min_size=n, max_size=n))
        for n in (num_queries, num_items)
    ]
    pairs = {(q, draw(st.integers(0, num_items - 1))) for q in range(num_queries)}
    every = list(itertools.product(range(num_queries), range(num_items)))
    pairs |= set(draw(st.lists(st.sampled_from(every), max_size=8)))
    return torch.tensor(features[0]).float(), torch.tensor(features[1]).float(), pairs


@settings(max_examples=150)
@given(problems(), st.integers(1, 12), st.integers(1, 10))
def test_equals_brute_force(problem: tuple[Tensor, Tensor, set[tuple[int, int]]], k: int, chunk: int) -> None:
    queries, gallery, pairs = problem
    result = recall_at_k(queries, gallery, torch.tensor(sorted(pairs)), [k], chunk_size=chunk)
    expected = brute_force_ranks(queries, gallery, pairs)
    assert result.ranks.tolist() == expected
    assert result.recalls[k] == pytest.approx(100 * sum(rank <= k for rank in expected) / len(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_collapsed_model_scores_nothing(dtype: torch.dtype) -> None:
    # The awkward sizes make matrix products use different kernels for different columns.
    one = torch.nn.functional.normalize(torch.randn(1, 129), dim=1).to(dtype)
    features = one.expand(203, 129)
    ids = torch.arange(203)
    metrics = retrieval_metrics(features, ids, features.clone(), ids)
    assert [metrics[f"{d}_r@{k}"] for d in ("i2t", "t2i") for k in (1, 5, 10)] == [0.0] * 6
    assert metrics["i2t_ties"] == metrics["t2i_ties"] == 100.0


def test_perfect_model_scores_everything() -> None:
    features = torch.eye(12)
    metrics = retrieval_metrics(features, torch.arange(12), features, torch.arange(12))
    assert metrics["mean_recall"] == 100.0
    assert metrics["t2i_ties"] == 0.0
    assert (metrics["num_images"], metrics["num_texts"]) == (12, 12)


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 10_000])
def test_chunks_do_not_matter(chunk_size: int) -> None:
    queries, gallery = torch.randn(83, 48), torch.randn(61, 48)
    gallery[30:] = gallery[:31].clone()  # exact ties across chunks
    pairs = torch.stack([torch.arange(83), torch.arange(83) % 61], dim=1)
    whole = recall_at_k(queries, gallery, pairs, chunk_size=1000)
    part = recall_at_k(queries, gallery, pairs, chunk_size=chunk_size)
    assert torch.equal(whole.ranks, part.ranks)
    assert whole.tie_share == part.tie_share > 0


def test_order_does_not_matter() -> None:
    images, texts = torch.randn(40, 16), torch.randn(70, 16)
    image_ids, text_ids = torch.arange(40) // 2, torch.arange(70) % 20
    images[5] = images[17]
    first = retrieval_metrics(images, image_ids, texts, text_ids)
    i, t = torch.randperm(40), torch.randperm(70)
    assert retrieval_metrics(images[i], image_ids[i], texts[t], text_ids[t]) == pytest.approx(first)


def test_scale_of_features_does_not_change_what_ties() -> None:
    queries, gallery = torch.randn(30, 8), torch.randn(30, 8)
    pairs = torch.arange(30)[:, None].expand(30, 2)
    expected = recall_at_k(queries, gallery, pairs).ranks
    for factor in (1e-6, 1e6):
        assert torch.equal(recall_at_k(queries * factor, gallery * factor, pairs).ranks, expected)


def test_other_right_items_are_not_in_the_way() -> None:
    query = torch.tensor([[1.0, 0.0]])
    gallery = torch.tensor([[1.0, 0], [0.9, 0], [0.8, 0], [0.7, 0]])
    assert recall_at_k(query, gallery, torch.tensor([[0, 2], [0, 1]])).ranks.tolist() == [2]
    assert recall_at_k(query, gallery, torch.tensor([[0, 3]])).ranks.tolist() == [4]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_never_hit(bad: float) -> None:
    queries, gallery = torch.eye(4), torch.eye(4)
    pairs = torch.arange(4)[:, None].expand(4, 2)
    queries[1] = bad
    result = recall_at_k(queries, gallery, pairs, [1, 4, 100])
    assert result.ranks.tolist() == [1, 5, 1, 1]
    assert result.recalls == {1: 75.0, 4: 75.0, 100: 75.0}
    gallery[2] = bad
    ranks = recall_at_k(torch.eye(4), gallery, pairs, [4]).ranks.tolist()
    assert ranks[2] == 5
    # A missing number ranks last; what is larger than every number cannot be kept from ranking first.
    assert ranks[0] == 1 or bad == math.inf


def test_broken_model_scores_nothing() -> None:
    features = torch.full((20, 8), math.nan)
    metrics = retrieval_metrics(features, torch.arange(20), features, torch.arange(20))
    assert metrics["mean_recall"] == 0.0


@settings(max_examples=60)
@given(st.integers(1, 8), st.integers(1, 10), st.data())
def test_chance_is_the_share_of_all_orders(num_gallery: int, k: int, data: st.DataObject) -> None:
    positives = data.draw(st.integers(1, num_gallery))
    subsets = list(itertools.combinations(range(num_gallery), positives))
    hits = sum(min(subset) < k for subset in subsets)
    expected = 100 * hits / len(subsets)
    assert chance_recall(num_gallery, k, num_positives=positives) == pytest.approx(expected)


def test_chance_of_random_features_is_met() -> None:
    images, texts, ids = torch.randn(600, 24), torch.randn(200, 24), torch.arange(600) % 200
    metrics = retrieval_metrics(images, ids, texts, torch.arange(200))
    assert metrics["t2i_chance@10"] == pytest.approx(chance_recall(600, 10, num_positives=3))
    assert metrics["i2t_chance@10"] == pytest.approx(5.0)
    assert metrics["t2i_r@10"] == pytest.approx(metrics["t2i_chance@10"], abs=5)
    assert metrics["i2t_r@10"] == pytest.approx(metrics["i2t_chance@10"], abs=4)


def test_distractors_stay_in_the_gallery_and_are_no_queries() -> None:
    images = torch.tensor([[1.0, 0], [0.9, 0.1], [0.0, 1]])
    texts = torch.tensor([[1.0, 0.2], [0.0, 1]])
    metrics = retrieval_metrics(images, torch.tensor([7, 1, 2]), texts, torch.tensor([1, 2]), ks=[1])
    assert metrics["t2i_r@1"] == 50.0  # image 0 belongs to nothing, but is nearer to text 0
    assert metrics["i2t_r@1"] == 100.0


@given(st.lists(st.integers(0, 4), max_size=9), st.lists(st.integers(0, 4), max_size=9))
def test_pairs_are_all_equal_ids(queries: list[int], gallery: list[int]) -> None:
    pairs = pairs_of_equal_ids(torch.tensor(queries, dtype=torch.long), torch.tensor(gallery, dtype=torch.long))
    expected = [(q, g) for q, a in enumerate(queries) for g, b in enumerate(gallery) if a == b]
    assert sorted(map(tuple, pairs.tolist())) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positives": torch.tensor([[0, 0]])}, "query 1 has no right item"),
        ({"positives": torch.tensor([[0, 0], [1, 9]])}, r"\[1, 9\] is outside"),
        ({"positives": torch.tensor([[0.0, 0.0]])}, "whole numbers"),
        ({"ks": [0]}, "at least 1"),
        ({"ks": []}, "at least 1"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"gallery_features": torch.eye(3)}, r"\(2, 2\) and \(3, 3\)"),
        ({"query_features": torch.empty(0, 2)}, "0 queries"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {
        "query_features": torch.eye(2),
        "gallery_features": torch.eye(2),
        "positives": torch.tensor([[0, 0], [1, 1]]),
    }
    with pytest.raises(ValueError, match=message):
        recall_at_k(**{**good, **change})  # type: ignore[arg-type]
