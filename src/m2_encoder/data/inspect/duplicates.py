"""False negatives: samples of one batch that a contrastive loss pushes apart although their content is the same.

Two samples that share a caption or an image, and are not marked as the same content (`identity`), are false negatives
of each other when a batch holds both. A batch samples one of a sample's k captions, each with probability 1/k.

For samples i and j let p_ij be the probability that they are false negatives of each other:

    p_ij = P(same caption) + [same image] - P(both)   if their identities differ, else 0

A random batch of B of the N samples holds (B - 1) / (N - 1) * sum_j p_ij of them for row i on average; the mean over i
is (B - 1) times the share of such pairs. A uniform sample of the source estimates that share without bias, because it
is a mean over pairs. (Derivation: ours, linearity of expectation.)

The share of rows with at least one is asked for each caption that a row may say, because its chances are not
independent of it: of M others that collide for certain none may be in the batch (hypergeometric, exact), and of the
others, each in the batch with probability f = (B - 1) / (N - 1) and colliding with p_j < 1, none may collide, which is
the product of 1 - f p_j. A share is never above the mean number.

Letters: n samples · m captions · B batch size.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Hashes = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]


class FalseNegatives(NamedTuple):
    """What to expect in a batch."""

    batch_size: int  # that is possible: not larger than the source
    per_row: float  # false negatives of a row, on average
    share_of_rows: float  # rows with at least one
    from_captions: float  # the part of `per_row` whose captions are the same
    from_images: float  # the part whose images are the same, those with the same caption included


def expect_false_negatives(
    *,
    row_of_caption: npt.NDArray[np.int64],
    captions: Hashes,
    images: Hashes,
    identities: Hashes,
    batch_size: int,
    is_whole: bool,
) -> FalseNegatives:
    """Expected false negatives in a batch of distinct random samples.

    Args:
        row_of_caption: which sample each caption belongs to, (m,).
        captions: hash of each caption, (m,); every sample has at least one.
        images: hash of each image, (n,).
        identities: hash of what marks the same content, (n,).
        batch_size: B; over all ranks whose rows are contrasted.
        is_whole: whether these are all samples of the source, or a random part of a much larger one. A batch
            cannot be larger than the whole.
    """
    n = len(images)
    if is_whole:
        batch_size = min(batch_size, n)
    if n < 2 or batch_size < 2:
        return FalseNegatives(batch_size, 0.0, 0.0, 0.0, 0.0)
    rows, captions, chance = _distinct_captions(row_of_caption, captions, n)
    said = _Captions(captions, images[rows], identities[rows])
    by_caption, by_both = said.sums(chance)
    by_image = _of_others(images, np.ones(n)) - _of_others(mix_hashes(images, identities), np.ones(n))
    colliding = np.clip(by_caption - by_both + by_image[rows], 0, n - 1)  # rounding leaves -1e-16
    drawn = batch_size - 1
    if is_whole:
        sure_by_caption, sure_by_both = said.sums((chance == 1).astype(np.float64))
        sure = np.round(sure_by_caption - sure_by_both + by_image[rows])
        missing = np.log1p(-np.where(chance < 1, chance, 0.0) * drawn / (n - 1))
        logs, logs_of_both = said.sums(missing)
        share = 1 - _chance_of_none(sure, n, drawn) * np.exp(np.minimum(logs - logs_of_both, 0.0))
    else:
        share = 1 - (1 - colliding / (n - 1)) ** drawn
    scale = drawn / (n - 1) / n
    return FalseNegatives(
        batch_size,
        per_row=float((chance * colliding).sum() * scale),
        share_of_rows=min(1.0, float((chance * share).sum() / n)),
        from_captions=float(max(0.0, (chance * by_caption).sum()) * scale),
        from_images=float(max(0.0, by_image.sum()) * scale),
    )


class _Captions(NamedTuple):
    """Each caption that a sample may say, with what it is compared by, (m,) each."""

    captions: Hashes
    images: Hashes
    identities: Hashes

    def sums(self, values: Floats) -> tuple[Floats, Floats]:
        """For each caption the sum of values of those of other content, with its words, and of these with its image."""
        both = mix_hashes(self.captions, self.images)
        with_words = _of_others(self.captions, values) - _of_others(mix_hashes(self.captions, self.identities), values)
        with_both = _of_others(both, values) - _of_others(mix_hashes(both, self.identities), values)
        return with_words, with_both


def _distinct_captions(
    rows: npt.NDArray[np.int64], captions: Hashes, n: int
) -> tuple[npt.NDArray[np.int64], Hashes, Floats]:
    """Each caption of a sample once, with the probability that the sample says it."""
    weights = 1.0 / np.bincount(rows, minlength=n)[rows]
    keys = mix_hashes(rows.astype(np.uint64), captions)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    chance = np.bincount(inverse, weights)
    return rows[first], captions[first], np.where(chance > 1 - 1e-9, 1.0, chance)


def mix_hashes(first: Hashes, second: Hashes) -> Hashes:
    """A hash of pairs, of the same shape; wraps on purpose."""
    mixed = first * np.uint64(0x9E3779B97F4A7C15) + second
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    return np.asarray(mixed ^ (mixed >> np.uint64(32)), np.uint64)


def class_sizes(keys: Hashes) -> npt.NDArray[np.int64]:
    """How often each distinct key occurs, in no order."""
    return np.unique(keys, return_counts=True)[1].astype(np.int64)


def _of_others(keys: Hashes, values: Floats) -> Floats:
    """For each entry, the sum of the values of all other entries with its key."""
    _, inverse = np.unique(keys, return_inverse=True)
    return np.bincount(inverse, values)[inverse] - values


def _chance_of_none(colliding: Floats, n: int, drawn: int) -> Floats:
    """Probability that none of `drawn` others, without repetition, is among the colliding ones."""
    left = torch.from_numpy(n - 1 - colliding)
    population = torch.tensor(float(n - 1), dtype=torch.float64)

    def log_factorial(value: torch.Tensor) -> torch.Tensor:
        return torch.lgamma(value + 1)

    chance_of_none = torch.exp(
        log_factorial(left)
        - log_factorial(torch.clamp(left - drawn, min=0))
        - log_factorial(population)
        + log_factorial(population - drawn)
    )
    return np.where(left.numpy() < drawn, 0.0, chance_of_none.numpy())
