"""Retrieval against the definition of CLIP_benchmark, and what makes a measure trustworthy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from m2_encoder.errors import UserError
from m2_encoder.evaluation.measures.parallel import measure_parallel
from m2_encoder.evaluation.measures.retrieval import Retrieval, measure_retrieval

METRICS = [f"{way}_r@{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)]


def values(found: Retrieval) -> list[float]:
    return [found.value(metric) for metric in METRICS]


def make_set(*, noise: float = 1.5, pictures: int = 120, captions: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    images = torch.randn(pictures, 48)
    texts = images.repeat_interleave(captions, 0) + noise * torch.randn(pictures * captions, 48)
    rows = torch.arange(pictures * captions)
    unit = torch.nn.functional.normalize
    return unit(images, dim=1), unit(texts, dim=1), torch.stack([rows, rows // captions], dim=1)


def clip_benchmark_recall(scores: Tensor, positive: Tensor, k: int) -> float:
    """CLIP_benchmark's definition: the share of queries whose first k hold at least one right item."""
    first = scores.topk(k, dim=1).indices
    return 100.0 * float((positive.gather(1, first).sum(dim=1) > 0).float().mean())


def test_standard_equals_the_definition_of_clip_benchmark() -> None:
    images, texts, pairs = make_set()
    scores = texts @ images.t()
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[pairs[:, 0], pairs[:, 1]] = True
    expected = [clip_benchmark_recall(scores, positive, k) for k in (1, 5, 10)]
    expected += [clip_benchmark_recall(scores.t(), positive.t(), k) for k in (1, 5, 10)]
    found = measure_retrieval(images, texts, pairs)
    assert values(found) == pytest.approx(expected, abs=1e-4)
    assert found.value("mean_recall") == pytest.approx(sum(expected) / 6, abs=1e-4)
    assert 20 < found.value("t2i_r@1") < 95  # neither end, where any definition agrees


def test_perfect_model_scores_100_with_the_exact_bound() -> None:
    found = measure_retrieval(torch.eye(30), torch.eye(30), torch.arange(30)[:, None].expand(30, 2))
    assert values(found) == [100.0] * 6
    low = pytest.approx(100 * 0.025 ** (1 / 30))  # the share at which 30 of 30 succeed in 2.5 % of all trials
    assert all((each.low, each.high, each.ties) == (low, 100.0, 0.0) for each in found.measurements)


def test_collapsed_model_scores_nothing() -> None:
    images, texts, pairs = make_set()
    one = images[:1]
    found = measure_retrieval(one.expand(len(images), -1), one.expand(len(texts), -1), pairs)
    assert values(found) == [0.0] * 6
    assert {each.ties for each in found.measurements} == {100.0}


def test_shuffled_pairs_score_chance() -> None:
    images, texts, pairs = make_set(pictures=700)
    shuffled = torch.stack([pairs[:, 0], pairs[torch.randperm(len(pairs)), 1]], dim=1)
    for each in measure_retrieval(images, texts, shuffled).measurements:
        assert each.chance is not None
        assert each.value == pytest.approx(each.chance, abs=1.2), each.metric


def test_intervals_hold_the_value_and_shrink_with_the_set() -> None:
    widths = []
    for pictures in (100, 1600):
        found = measure_retrieval(*make_set(pictures=pictures, noise=2.5))
        for each in found.measurements:
            assert each.low is not None
            assert each.high is not None
            assert each.low <= each.value <= each.high
        first = found.measurements[0]
        widths.append((first.high or 0) - (first.low or 0))
    assert widths[1] < widths[0] / 2.5
    again = measure_retrieval(*make_set(pictures=100), seed=3)
    assert again.measurements[0].n == 300


def test_distractors_are_no_queries_and_which_query_ranks_where_is_kept() -> None:
    images, texts, pairs = make_set(pictures=40)
    kept = pairs[(pairs[:, 1] != 7) & (pairs[:, 0] != 3)]
    found = measure_retrieval(images, texts, kept)
    t2i, i2t = found.directions
    assert t2i.queries.tolist() == [row for row in range(120) if row not in (3, 21, 22, 23)]
    assert i2t.queries.tolist() == [row for row in range(40) if row != 7]
    assert (t2i.ranks.num_gallery, i2t.ranks.num_gallery) == (40, 120)
    whole = measure_retrieval(images, texts, pairs).directions[0]
    assert torch.equal(t2i.ranks.ranks, whole.ranks.ranks[t2i.queries])


def test_parallel_texts_both_ways() -> None:
    zh, en, pairs = make_set(captions=1, noise=0.6)
    found = measure_parallel(("zh", "en"), zh, en, pairs.flip(1))
    assert [each.metric for each in found.measurements][::3] == ["zh2en_r@1", "en2zh_r@1", "mean_recall"]
    scores = zh @ en.t()
    positive = torch.eye(len(zh), dtype=torch.bool)
    assert found.value("zh2en_r@1") == pytest.approx(clip_benchmark_recall(scores, positive, 1))
    assert found.value("en2zh_r@1") == pytest.approx(clip_benchmark_recall(scores.t(), positive, 1))
    one = zh[:1].expand_as(zh)
    assert measure_parallel(("zh", "en"), one, one, pairs).value("mean_recall") == 0.0
    shuffled = measure_parallel(("zh", "en"), zh, en[torch.randperm(len(en))], pairs).measurements[0]
    assert shuffled.value == pytest.approx(shuffled.chance, abs=4)
    assert measure_parallel(("zh", "en"), zh, zh, pairs).value("mean_recall") == 100.0


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest new tensor has."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, Tensor))])
        return found


def test_all_similarities_are_never_in_memory_together() -> None:
    images, texts, pairs = make_set(pictures=2500, captions=2, noise=0.5)
    with LargestTensor() as largest:
        measure_retrieval(images, texts, pairs, chunk_size=256)
    assert largest.size <= 600_000 < len(images) * len(texts) / 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_features": torch.tensor([[1.0, math.nan], [0, 1], [math.inf, 0]])}, "2 of 3 image features are not"),
        ({"text_features": torch.full((3, 2), math.nan)}, "3 of 3 text features are not finite"),
        ({"text_features": torch.eye(3)}, r"image features \(3, 2\), text features \(3, 3\)"),
        ({"text_features": torch.empty(0, 2)}, "at least one row"),
        ({"pairs": torch.tensor([[0, 0], [1, 3]])}, "a pair names image row 3; there are 3 image rows"),
        ({"pairs": torch.tensor([[-1, 0]])}, "text row -1"),
        ({"pairs": torch.empty(0, 2, dtype=torch.long)}, "at least one"),
        ({"pairs": torch.tensor([[0.0, 0.0]])}, "whole numbers"),
    ],
)
def test_what_cannot_be_measured_is_named(change: dict[str, Tensor], message: str) -> None:
    good = {"image_features": torch.ones(3, 2), "text_features": torch.ones(3, 2), "pairs": torch.tensor([[0, 0]])}
    with pytest.raises(UserError, match=message):
        measure_retrieval(**{**good, **change})
