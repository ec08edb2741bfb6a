"""Retrieval with many right items, both ways: R@k, mean recall, chance, ties, intervals.

R@k is the percentage of queries with a right item among their first k. torchmetrics' `RetrievalRecall` is another
number (the share of right items found), and its `RetrievalHitRate` breaks ties by their order and wants all
similarities at once; `evaluation.recall_metric.RetrievalRecall` is a torchmetrics class around what is done here.

Letters: n images · m texts · P pairs · Q queries · E feature dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from m2_encoder.evaluation.measures.intervals import bootstrap_means, interval
from m2_encoder.evaluation.measures.ranks import CHUNK_SIZE, Ranks, rank_both_ways
from m2_encoder.evaluation.measures.result import Measurement, check_finite, check_pairs, check_same_width
from m2_encoder.evaluation.metrics import RECALL_KS, check_ks, mean_chance


class Direction(NamedTuple):
    """The queries of one direction."""

    name: str  # "t2i", "i2t"; of two languages "zh2en"
    queries: Tensor  # rows of the side that asks, those with a right item, (Q,) int64
    ranks: Ranks  # of these rows
    measurements: tuple[Measurement, ...]  # R@k
    mean: Measurement  # of these, such as "t2i_mean_recall"


class Retrieval(NamedTuple):
    """Both directions."""

    measurements: tuple[Measurement, ...]  # R@k of both, and "mean_recall"
    directions: tuple[Direction, Direction]  # for galleries: which query ranks where

    def value(self, metric: str) -> float:
        """One of the numbers."""
        return next(found.value for found in self.measurements if found.metric == metric)


def measure_retrieval(
    image_features: Tensor,
    text_features: Tensor,
    pairs: Tensor,
    back_pairs: Tensor | None = None,
    *,
    ks: Sequence[int] = RECALL_KS,
    names: tuple[str, str] = ("t2i", "i2t"),
    seed: int = 0,
    chunk_size: int = CHUNK_SIZE,
) -> Retrieval:
    """Recalls of images for texts and of texts for images, by inner products.

    Texts and images without a right item stay in the gallery and are no queries. A wrong item that ties with the right
    one ranks before it.

    Args:
        image_features: (n, E), any floating dtype.
        text_features: (m, E).
        pairs: rows of a text and of an image that is right for it, (P, 2) int64; `protocols.find_positives` makes both.
        back_pairs: rows of an image and of a text, (P', 2); by default `pairs` the other way round.
        ks: cut-offs.
        names: of the directions, that of the texts first.
        seed: of the intervals; texts of one image are drawn together, and images of one text.
        chunk_size: as in `ranks.rank_queries`.

    Raises:
        UserError: if a feature is not finite, sides do not fit each other, or a pair names a row that does not exist.
    """
    sides = {"image": image_features, "text": text_features}
    check_same_width(sides)
    check_finite(sides)
    images, texts = ("image", len(image_features)), ("text", len(text_features))
    pairs = check_pairs(pairs, texts, images)
    back_pairs = pairs.flip(1) if back_pairs is None else check_pairs(back_pairs, images, texts)
    first, second = rank_both_ways(text_features, image_features, pairs, back_pairs, chunk_size=chunk_size)
    return summarize_retrieval(first, second, pairs, back_pairs, ks=ks, names=names, seed=seed)


def summarize_retrieval(
    first: Ranks,
    second: Ranks,
    pairs: Tensor,
    back_pairs: Tensor | None = None,
    *,
    ks: Sequence[int] = RECALL_KS,
    names: tuple[str, str] = ("t2i", "i2t"),
    seed: int = 0,
) -> Retrieval:
    """The numbers of ranks that were found before, such as by `shards.rank_shards`: of all texts, and of all images.

    Arguments are those of `measure_retrieval`.
    """
    check_ks(ks)
    found, resampled, fewest = [], [], 0
    back_pairs = pairs.flip(1) if back_pairs is None else back_pairs
    for name, ranks, own in zip(names, (first, second), (pairs, back_pairs), strict=True):
        direction, means, draws = _summarize_direction(name, ranks, own.cpu(), ks, seed)
        found.append(direction)
        resampled.append(means)
        fewest = min(fewest or draws, draws)
    recalls = [each for direction in found for each in direction.measurements]
    low, high = interval(torch.cat(resampled, dim=1).mean(dim=1), fewest)
    queries = sum(len(direction.queries) for direction in found)
    mean = Measurement(
        "mean_recall",
        sum(each.value for each in recalls) / len(recalls),
        queries,
        low,
        high,
        sum(each.chance or 0.0 for each in recalls) / len(recalls),
        sum(len(each.queries) * each.ranks.tie_share for each in found) / queries,
    )
    return Retrieval((*recalls, mean), (found[0], found[1]))


def _summarize_direction(
    name: str, ranks: Ranks, pairs: Tensor, ks: Sequence[int], seed: int
) -> tuple[Direction, Tensor, int]:
    """A direction, its recalls over resampled queries, (R, len(ks)) in percent, and how many groups were drawn."""
    positives = torch.bincount(pairs[:, 0], minlength=len(ranks.ranks))
    # Queries with the same right item stand and fall together: they are drawn together.
    groups = torch.full_like(positives, ranks.num_gallery).scatter_reduce(0, pairs[:, 0], pairs[:, 1], "amin")
    queries = positives.nonzero()[:, 0]
    ranks = ranks.of(queries)
    hits = torch.stack([ranks.hits(k) for k in ks], dim=1)
    means = 100.0 * bootstrap_means(hits, groups[queries], seed=seed)
    draws, found = len(groups[queries].unique()), []
    for number, k in enumerate(ks):
        low, high = interval(means[:, number], draws)
        chance = mean_chance(ranks.num_gallery, k, positives[queries])
        found.append(Measurement(f"{name}_r@{k}", ranks.recall(k), len(queries), low, high, chance, ranks.tie_share))
    low, high = interval(means.mean(dim=1), draws)
    value, chance = (sum(each) / len(ks) for each in zip(*((m.value, m.chance or 0.0) for m in found), strict=True))
    mean = Measurement(f"{name}_mean_recall", value, len(queries), low, high, chance, ranks.tie_share)
    return Direction(name, queries, ranks, tuple(found), mean), means, draws
