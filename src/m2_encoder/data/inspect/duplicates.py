"""False negatives: samples of one batch that a contrastive loss pushes apart although their content is the same.

Two samples that share a caption or an image, and are not marked as the same content (`identity`), are false negatives
of each other when a batch holds both. A batch samples one of a sample's k captions, each with probability 1/k.

For samples i and j let p_ij be the probability that they are false negatives of each other:

    p_ij = P(same caption) + [same image] - P(both)   if their identities differ, else 0

A random batch of B of the N samples holds (B - 1) / (N - 1) * sum_j p_ij of them for row i on average; the mean over i
is (B - 1) times the share of such pairs. A uniform sample of the source estimates that share without bias, because it
is a mean over pairs. (Derivation: ours, linearity of expectation.)

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

    batch_size: int
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
    if n < 2 or batch_size < 2:
        return FalseNegatives(batch_size, 0.0, 0.0, 0.0, 0.0)
    weights: Floats = 1.0 / np.bincount(row_of_caption, minlength=n)[row_of_caption]

    def others(keys: Hashes, of: npt.NDArray[np.int64] | None = None) -> Floats:
        """For each sample, how many others share a key with it, on average over its captions."""
        if of is None:
            return _sum_of_others(keys, np.ones(n))
        return np.asarray(np.bincount(of, _sum_of_others(keys, weights), minlength=n), np.float64)

    rows = row_of_caption
    by_caption = others(captions, rows) - others(mix_hashes(captions, identities[rows]), rows)
    by_image = others(images) - others(mix_hashes(images, identities))
    both = mix_hashes(captions, images[rows])
    by_both = others(both, rows) - others(mix_hashes(both, identities[rows]), rows)
    colliding = np.clip(by_caption + by_image - by_both, 0, n - 1)  # rounding leaves -1e-16
    drawn = min(batch_size, n) - 1 if is_whole else batch_size - 1
    share = _share_with_one(colliding, n, drawn) if is_whole else 1 - (1 - colliding / (n - 1)) ** drawn
    scale = drawn / (n - 1) / n
    return FalseNegatives(
        batch_size,
        per_row=float(colliding.sum() * scale),
        share_of_rows=float(share.mean()),
        from_captions=float(max(0.0, by_caption.sum()) * scale),
        from_images=float(max(0.0, by_image.sum()) * scale),
    )


def mix_hashes(first: Hashes, second: Hashes) -> Hashes:
    """A hash of pairs, of the same shape; wraps on purpose."""
    mixed = first * np.uint64(0x9E3779B97F4A7C15) + second
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    return np.asarray(mixed ^ (mixed >> np.uint64(32)), np.uint64)


def class_sizes(keys: Hashes) -> npt.NDArray[np.int64]:
    """How often each distinct key occurs, in no order."""
    return np.unique(keys, return_counts=True)[1].astype(np.int64)


def _sum_of_others(keys: Hashes, weights: Floats) -> Floats:
    """For each entry, its weight times the weight of all other entries with its key."""
    _, inverse = np.unique(keys, return_inverse=True)
    total = np.bincount(inverse, weights)[inverse]
    return weights * (total - weights)


def _share_with_one(colliding: Floats, n: int, drawn: int) -> Floats:
    """Probability that at least one of `drawn` others, without repetition, is among the colliding ones."""
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
    return np.where(left.numpy() < drawn, 1.0, 1 - chance_of_none.numpy())
