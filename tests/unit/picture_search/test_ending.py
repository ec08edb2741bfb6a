"""The probable end of results whose right answer is known by construction."""

from __future__ import annotations

import numpy as np
import pytest

from m2_encoder.picture_search.ending import find_end


def noise(number: int = 2000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.1, 0.02, number)


@pytest.mark.parametrize("right", [1, 3, 30])
def test_line_is_drawn_between_finds_and_the_rest(right: int) -> None:
    finds = np.linspace(0.40, 0.39, right)
    scores = np.sort(np.concatenate([finds, noise()]))[::-1]
    assert find_end(scores[:100], scores[::2], len(scores)) == right


def test_nothing_stands_out_of_noise_by_far() -> None:
    ends = []
    for seed in range(50):
        scores = np.sort(noise(seed=seed))[::-1]
        ends.append(find_end(scores[:50], scores, 10**9))
    assert max(ends) == 0, "of a billion pictures the best unrelated one would stand higher"


def test_scale_and_offset_of_scores_do_not_matter() -> None:
    scores = np.sort(np.concatenate([[0.30, 0.29, 0.2], noise()]))[::-1]
    plain = find_end(scores[:20], scores, 2003)
    assert plain == find_end(scores[:20] * 0.1 - 0.7, scores * 0.1 - 0.7, 2003) == 2


def test_copies_of_the_query_do_not_decide() -> None:
    scores = np.sort(np.concatenate([[0.6, 0.58, 0.57], noise()]))[::-1]
    with_copies = np.concatenate([[1.0004, 0.9996], scores])
    assert find_end(scores[:20], scores, 2003) == 3
    assert find_end(with_copies[:20], scores, 2005) == 5
    assert find_end([1.0, 1.0], scores, 2005) == 2


def test_lists_without_contrast() -> None:
    assert find_end([], [], 0) == 0
    assert find_end([0.5], [0.5], 1) == 1
    assert find_end([0.5] * 4, [0.5] * 4, 4) == 4
