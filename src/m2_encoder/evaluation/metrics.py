"""Exact recall at k between two sides.

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

RECALL_KS = (1, 5, 10)

# Scores closer than this (times both norms) tie: matrix products round differently from column to column, in fp64 by
# less than 1e-14.
_TIE_TOLERANCE = 1e-12


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
    chunk_size: int = 2048,
) -> RecallResult:
    """Exact recall at k by inner products in fp64, in chunks, so that memory does not grow with Q * M.

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
    if not ks or min(ks) < 1:
        raise ValueError(f"ks={list(ks)} must hold whole numbers of at least 1")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    if query_features.device.type == "mps":  # has no fp64
        query_features, gallery_features = query_features.cpu(), gallery_features.cpu()
    pairs = pairs.to(query_features.device)
    best = _best_right_scores(query_features, gallery_features, pairs, chunk_size)
    ahead, tied = _count_wrong_ahead(query_features, gallery_features, pairs, best, chunk_size)
    never = gallery_features.shape[0] + 1
    ranks = torch.where(best.isfinite(), ahead + 1, never).cpu()
    return RecallResult(
        recalls={k: _percent(ranks <= min(k, never - 1)) for k in ks}, ranks=ranks, tie_share=_percent(tied.cpu())
    )


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
    chunk_size: int = 2048,
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
    metrics: dict[str, float] = {}
    sides = {"i2t": (image_features, image_ids, text_features, text_ids)}
    sides["t2i"] = (text_features, text_ids, image_features, image_ids)
    for direction, (queries, query_ids, gallery, gallery_ids) in sides.items():
        usable = torch.isin(query_ids, gallery_ids)
        if not usable.any():
            raise ValueError(f"none of {len(image_ids)} images shares an id with one of {len(text_ids)} texts")
        pairs = pairs_of_equal_ids(query_ids[usable], gallery_ids)
        result = recall_at_k(queries[usable], gallery, pairs, ks, chunk_size=chunk_size)
        numbers, queries_with = torch.bincount(pairs[:, 0]).unique(return_counts=True)
        for k in ks:
            metrics[f"{direction}_r@{k}"] = result.recalls[k]
            metrics[f"{direction}_chance@{k}"] = sum(
                chance_recall(len(gallery), k, num_positives=number) * share / int(usable.sum())
                for number, share in zip(numbers.tolist(), queries_with.tolist(), strict=True)
            )
        metrics[f"{direction}_ties"] = result.tie_share
    metrics["mean_recall"] = sum(metrics[f"{d}_r@{k}"] for d in sides for k in ks) / (2 * len(ks))
    metrics["num_images"] = float(len(image_ids))
    metrics["num_texts"] = float(len(text_ids))
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


def _best_right_scores(queries: Tensor, gallery: Tensor, pairs: Tensor, chunk_size: int) -> Tensor:
    """Highest score of each query's right items, (Q,) fp64; -inf where none is a number."""
    best = queries.new_full((len(queries),), -math.inf, dtype=torch.float64)
    for part in pairs.split(chunk_size):
        scores = (queries[part[:, 0]].double() * gallery[part[:, 1]].double()).sum(dim=1)
        best.scatter_reduce_(0, part[:, 0], scores.masked_fill(~scores.isfinite(), -math.inf), "amax")
    return best


def _count_wrong_ahead(
    queries: Tensor, gallery: Tensor, pairs: Tensor, best: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """How many wrong items score at least `best`, (Q,) int64, and whether one of them ties, (Q,) bool."""
    ahead = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
    tied = torch.zeros_like(ahead, dtype=torch.bool)
    largest = torch.nan_to_num(gallery.double().norm(dim=1), 0.0, 0.0, 0.0).max()
    bounds = torch.arange(0, len(queries) + chunk_size, chunk_size, device=queries.device)
    starts = torch.searchsorted(pairs[:, 0].contiguous(), bounds).tolist()
    for number, start in enumerate(range(0, len(queries), chunk_size)):
        rows = slice(start, start + chunk_size)
        part = queries[rows].double()
        tolerance = torch.nan_to_num(part.norm(dim=1), 0.0, 0.0, 0.0) * largest * _TIE_TOLERANCE
        own = pairs[starts[number] : starts[number + 1]]
        for column in range(0, len(gallery), chunk_size):
            scores = part @ gallery[column : column + chunk_size].double().t()
            inside = own[(own[:, 1] >= column) & (own[:, 1] < column + chunk_size)]
            scores[inside[:, 0] - start, inside[:, 1] - column] = math.nan  # right items never stand in the way
            distance = scores - best[rows, None]
            ahead[rows] += (distance >= -tolerance[:, None]).sum(dim=1)
            tied[rows] |= (distance.abs() <= tolerance[:, None]).any(dim=1)
    return ahead, tied


def _percent(hits: Tensor) -> float:
    return 100.0 * float(hits.double().mean())
