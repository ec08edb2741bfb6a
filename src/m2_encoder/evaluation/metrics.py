"""Exact recall at k between two sides; `measures.ranks` says how ranks are found.

R@k is the percentage of queries with at least one right item among their first k. Ranks are pessimistic: a wrong item
with the same score as the right one ranks before it, so a model that gives all items the same feature scores 0.

Letters: Q queries · M gallery items · P pairs of a query and a right item · E feature dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from m2_encoder.evaluation.measures.ranks import CHUNK_SIZE, Ranks, rank_both_ways, rank_queries

RECALL_KS = (1, 5, 10)


class RecallResult(NamedTuple):
    """Recalls, ranks and ties."""

    recalls: dict[int, float]  # percent of the queries with a right item among the first k, by k
    ranks: Tensor  # rank of the best right item, from 1, (Q,) int64 on the CPU; M + 1 where a score is not finite
    tie_share: float  # percent of the queries whose best right item ties with a wrong one


def recall_at_k(
    query_features: Tensor,
    gallery_features: Tensor,
    positives: Tensor,
    ks: Sequence[int] = RECALL_KS,
    *,
    chunk_size: int = CHUNK_SIZE,
) -> RecallResult:
    """Exact recall at k by inner products, in chunks, so that memory does not grow with Q * M.

    A query whose own score is not finite never hits. A gallery item whose feature is not finite ranks last.

    Args:
        query_features: (Q, E), any floating dtype.
        gallery_features: (M, E), same device.
        positives: pairs of (query, right gallery item), (P, 2) int64; every query needs at least one. Of several,
            the best ranked counts, and the others do not push it back.
        ks: cut-offs, at least 1; capped at M.
        chunk_size: rows of either side that are compared at once.

    Raises:
        ValueError: for shapes that do not fit, a pair outside both sides, a query without a right item, a k
            below 1.
    """
    _check_features(query_features, gallery_features)
    pairs = _checked_pairs(positives, query_features.shape[0], gallery_features.shape[0])
    check_ks(ks)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    found = rank_queries(query_features, gallery_features, pairs, chunk_size=chunk_size)
    return RecallResult({k: found.recall(k) for k in ks}, found.ranks, found.tie_share)


def pairs_of_equal_ids(query_ids: Tensor, gallery_ids: Tensor) -> Tensor:
    """All pairs of rows with the same id, ordered by query: (Q,) and (M,) int64 to (P, 2) int64."""
    ordered, order = gallery_ids.sort(stable=True)
    first = torch.searchsorted(ordered, query_ids, side="left")
    counts = torch.searchsorted(ordered, query_ids, side="right") - first
    rows = torch.arange(len(query_ids), device=query_ids.device).repeat_interleave(counts)
    offsets = torch.arange(len(rows), device=query_ids.device) - (counts.cumsum(0) - counts)[rows]
    return torch.stack([rows, order[first[rows] + offsets]], dim=1)


def chance_recall(num_gallery: int, k: int, *, num_positives: int = 1) -> float:
    """Exact recall at k of a random order (hypergeometric), in percent.

    Raises:
        ValueError: if there are no positives, or more than gallery items, or for a k below 1.
    """
    if not 1 <= num_positives <= num_gallery:
        raise ValueError(f"num_positives={num_positives} must be in 1..{num_gallery}, the gallery's size")
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    misses = math.comb(num_gallery - num_positives, k) / math.comb(num_gallery, k) if k <= num_gallery else 0.0
    return 100.0 * (1.0 - misses)


def retrieval_metrics(
    image_features: Tensor,
    image_ids: Tensor,
    text_features: Tensor,
    text_ids: Tensor,
    *,
    ks: Sequence[int] = RECALL_KS,
    chunk_size: int = CHUNK_SIZE,
) -> dict[str, float]:
    """Recalls in both directions, and those of a random order.

    Items whose id the other side lacks are distractors: they stay in the gallery and are no queries.

    Args:
        image_features: (n, E).
        image_ids: (n,) int64; images and texts with equal ids belong together.
        text_features: (m, E).
        text_ids: (m,) int64.
        ks: cut-offs.
        chunk_size: as in `recall_at_k`.

    Returns:
        `i2t_r@k` and `t2i_r@k` in percent; `mean_recall`, their mean; `i2t_chance@k` and `t2i_chance@k` of a random
        order; `i2t_ties` and `t2i_ties`, percent of the queries; `num_images` and `num_texts`.

    Raises:
        ValueError: if no image and text belong together, or shapes do not fit.
    """
    _check_features(text_features, image_features)
    check_ks(ks)
    pairs = pairs_of_equal_ids(text_ids, image_ids)
    t2i, i2t = rank_both_ways(text_features, image_features, pairs, chunk_size=chunk_size)
    return collect_metrics(t2i, i2t, pairs, ks)


def collect_metrics(t2i: Ranks, i2t: Ranks, pairs: Tensor, ks: Sequence[int]) -> dict[str, float]:
    """What `retrieval_metrics` returns, from the ranks of all texts and images, and their pairs, (P, 2) int64."""
    num_images, num_texts = t2i.num_gallery, i2t.num_gallery
    if not len(pairs):
        raise ValueError(f"none of {num_images} images shares an id with one of {num_texts} texts")
    metrics: dict[str, float] = {}
    for direction, found, column in (("i2t", i2t, 1), ("t2i", t2i, 0)):
        positives = torch.bincount(pairs[:, column], minlength=len(found.ranks)).cpu()
        metrics |= _direction_metrics(direction, found, positives, ks)
    metrics["mean_recall"] = sum(metrics[f"{way}_r@{k}"] for way in ("i2t", "t2i") for k in ks) / (2 * len(ks))
    metrics["num_images"] = float(num_images)
    metrics["num_texts"] = float(num_texts)
    return metrics


def mean_chance(num_gallery: int, k: int, positives: Tensor) -> float:
    """Mean of `chance_recall` over queries with so many right items each, (Q,) int64."""
    numbers, counts = positives.unique(return_counts=True)
    chances = [chance_recall(num_gallery, k, num_positives=number) for number in numbers.tolist()]
    return sum(chance * count for chance, count in zip(chances, counts.tolist(), strict=True)) / len(positives)


def check_ks(ks: Sequence[int]) -> None:
    """Refuses cut-offs below 1, and none at all."""
    if not ks or min(ks) < 1:
        raise ValueError(f"ks={list(ks)} must hold whole numbers of at least 1")


def _direction_metrics(direction: str, found: Ranks, positives: Tensor, ks: Sequence[int]) -> dict[str, float]:
    """The entries of one direction; `positives` are the numbers of right items, items without are no queries."""
    queries, positives = found.of(positives > 0), positives[positives > 0]
    metrics = {}
    for k in ks:
        metrics[f"{direction}_r@{k}"] = queries.recall(k)
        metrics[f"{direction}_chance@{k}"] = mean_chance(found.num_gallery, k, positives)
    metrics[f"{direction}_ties"] = queries.tie_share
    return metrics


def _check_features(queries: Tensor, gallery: Tensor) -> None:
    if queries.dim() != 2 or gallery.dim() != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"features must be (Q, E) and (M, E), got {tuple(queries.shape)} and {tuple(gallery.shape)}")
    if not len(queries) or not len(gallery):
        raise ValueError(f"{len(queries)} queries and {len(gallery)} gallery items: both sides need at least one")


def _checked_pairs(pairs: Tensor, num_queries: int, num_gallery: int) -> Tensor:
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.is_floating_point():
        raise ValueError(f"positives must be (P, 2) whole numbers, got {tuple(pairs.shape)} {pairs.dtype}")
    pairs = pairs.long().cpu()
    limit = torch.tensor([num_queries, num_gallery])
    wrong = ((pairs < 0) | (pairs >= limit)).any(dim=1)
    if wrong.any():
        raise ValueError(
            f"positive pair {pairs[wrong][0].tolist()} is outside {num_queries} queries x {num_gallery} items"
        )
    counts = torch.bincount(pairs[:, 0], minlength=num_queries)
    if (counts == 0).any():
        row = int((counts == 0).nonzero()[0])
        raise ValueError(f"query {row} has no right item; leave it out of the queries (it may stay in the gallery)")
    return pairs[pairs[:, 0].argsort(stable=True)]
