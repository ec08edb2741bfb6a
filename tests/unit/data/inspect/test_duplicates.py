"""Expected false negatives against all batches that there are, one by one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m2_encoder.data.inspect.duplicates import FalseNegatives, class_sizes, expect_false_negatives, mix_hashes

Sample = tuple[tuple[int, ...], int, int]  # captions, image, identity


def _expect(samples: list[Sample], batch_size: int, *, is_whole: bool = True) -> FalseNegatives:
    return expect_false_negatives(
        row_of_caption=np.array([row for row, sample in enumerate(samples) for _ in sample[0]], np.int64),
        captions=np.array([text for sample in samples for text in sample[0]], np.uint64),
        images=np.array([sample[1] for sample in samples], np.uint64),
        identities=np.array([sample[2] for sample in samples], np.uint64),
        batch_size=batch_size,
        is_whole=is_whole,
    )


def _count(samples: list[Sample], batch_size: int) -> tuple[float, float]:
    """Mean over all batches, and over all captions that their samples may speak."""
    per_row, with_one, rows = 0.0, 0.0, 0.0
    for batch in itertools.combinations(samples, batch_size):
        choices = list(itertools.product(*(sample[0] for sample in batch)))
        for spoken in choices:
            hits = [
                sum(
                    batch[i][2] != batch[j][2] and (spoken[i] == spoken[j] or batch[i][1] == batch[j][1])
                    for j in range(batch_size)
                    if j != i
                )
                for i in range(batch_size)
            ]
            per_row += sum(hits) / len(choices)
            with_one += sum(hit > 0 for hit in hits) / len(choices)
        rows += batch_size
    return per_row / rows, with_one / rows


ONE_CAPTION = st.tuples(st.tuples(st.integers(0, 3)), st.integers(0, 4), st.integers(0, 5))
SOME_CAPTIONS = st.tuples(
    st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True).map(tuple), st.integers(0, 4), st.integers(0, 5)
)


@settings(max_examples=40)
@given(st.lists(ONE_CAPTION, min_size=2, max_size=7), st.integers(2, 4))
def test_equals_all_batches(samples: list[Sample], batch_size: int) -> None:
    batch_size = min(batch_size, len(samples))
    found = _expect(samples, batch_size)
    per_row, with_one = _count(samples, batch_size)
    assert found.per_row == pytest.approx(per_row, abs=1e-9)
    assert found.share_of_rows == pytest.approx(with_one, abs=1e-9)


@settings(max_examples=25)
@given(st.lists(SOME_CAPTIONS, min_size=2, max_size=5), st.integers(2, 3))
def test_mean_is_exact_for_several_captions(samples: list[Sample], batch_size: int) -> None:
    batch_size = min(batch_size, len(samples))
    assert _expect(samples, batch_size).per_row == pytest.approx(_count(samples, batch_size)[0], abs=1e-9)


@settings(max_examples=25)
@given(st.lists(SOME_CAPTIONS, min_size=2, max_size=5))
def test_share_is_exact_for_several_captions_in_a_batch_of_all(samples: list[Sample]) -> None:
    found = _expect(samples, len(samples) + 3)
    assert found.batch_size == len(samples)
    per_row, with_one = _count(samples, len(samples))
    assert found.share_of_rows == pytest.approx(with_one, abs=1e-9)
    assert found.per_row == pytest.approx(per_row, abs=1e-9)


@given(st.lists(SOME_CAPTIONS, min_size=2, max_size=40), st.integers(2, 60), st.booleans())
def test_share_of_rows_is_never_above_the_number_per_row(
    samples: list[Sample], batch_size: int, is_whole: bool
) -> None:
    found = _expect(samples, batch_size, is_whole=is_whole)
    assert 0 <= found.share_of_rows <= min(1, found.per_row + 1e-9)


@pytest.mark.parametrize("batch_size", [64, 256, 100_000])
def test_share_is_that_of_simulated_batches(batch_size: int) -> None:
    """Five captions each, some of them common: 570 pictures, and batches up to all of them."""
    rng = np.random.default_rng(0)
    number = 570
    captions = rng.integers(0, 4000, (number, 5))
    captions[:, 0] = rng.integers(0, 300, number)
    captions[:120, 1] = captions[:120, 2] = rng.integers(0, 20, 120)  # one caption twice
    images = rng.integers(0, 5000, number)
    samples: list[Sample] = [(tuple(map(int, captions[i])), int(images[i]), i) for i in range(number)]
    found = _expect(samples, batch_size)
    size = min(batch_size, number)
    assert found.batch_size == size
    with_one, per_row, rounds = 0.0, 0.0, 150 if size > 100 else 1500
    for _ in range(rounds):
        rows = rng.permutation(number)[:size]
        said = captions[rows, rng.integers(0, 5, size)]
        same = (said[:, None] == said) | (images[rows, None] == images[rows])
        hits = same.sum(axis=1) - 1
        with_one += float((hits > 0).mean()) / rounds
        per_row += float(hits.mean()) / rounds
    assert found.per_row == pytest.approx(per_row, rel=0.05)
    assert found.share_of_rows == pytest.approx(with_one, rel=0.05)
    assert found.share_of_rows < found.per_row


def test_part_of_a_source_estimates_the_whole() -> None:
    """A caption that 1 % of ten thousand pairs share, seen through two thousand of them."""
    rng = np.random.default_rng(0)
    source: list[Sample] = [((i if i >= 100 else 0,), i, i) for i in range(10_000)]
    whole = _expect(source, 512)
    assert whole.per_row == pytest.approx(511 * 100 * 99 / (10_000 * 9_999), rel=1e-9)
    parts = [_expect([source[i] for i in rng.permutation(10_000)[:2000]], 512, is_whole=False) for _ in range(40)]
    assert np.mean([part.per_row for part in parts]) == pytest.approx(whole.per_row, rel=0.1)
    assert np.mean([part.share_of_rows for part in parts]) == pytest.approx(whole.share_of_rows, rel=0.1)


def test_marked_content_is_no_false_negative() -> None:
    same: list[Sample] = [((1,), 1, 7), ((1,), 1, 7)]
    assert _expect(same, 2).per_row == 0
    assert _expect([((1,), 1, 7), ((1,), 1, 8)], 2)[1:] == (1, 1, 1, 1)
    assert _expect([((1,), 1, 7), ((2,), 1, 8)], 2)[1:] == (1, 1, 0, 1)


@pytest.mark.parametrize(("samples", "batch_size"), [([], 8), ([((1,), 1, 1)], 8), ([((1,), 1, 1)] * 3, 1)])
def test_nothing_to_contrast(samples: list[Sample], batch_size: int) -> None:
    assert _expect(samples, batch_size)[1:] == (0, 0, 0, 0)


def test_batch_is_no_larger_than_the_whole() -> None:
    samples: list[Sample] = [((0,), i, i) for i in range(5)]
    assert _expect(samples, 1000).per_row == 4
    assert _expect(samples, 1000, is_whole=False).per_row == 999


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), unique=True, max_size=200))
def test_hashes_of_pairs_differ(pairs: list[tuple[int, int]]) -> None:
    first, second = (np.array([pair[i] for pair in pairs], np.uint64) for i in (0, 1))
    assert len(class_sizes(mix_hashes(first, second))) == len(pairs)
