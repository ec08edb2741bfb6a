"""The order of training samples: a pure function of (seed, position).

Every sample that a run ever sees has a position, counted over all ranks from 0. Batch t of rank r of R holds the
positions t*B + r, t*B + r + R, ... (B: global batch size). Which sample stands at a position, and every random choice
made for it, depend on the seed and the position alone; never on ranks, workers or time. So one integer resumes a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from m2_encoder.errors import UserError

_ORDER_STREAM, _SAMPLE_STREAM = 0, 1


@dataclass(frozen=True)
class SampleOrder:
    """Shuffled epochs, one after the other.

    Attributes:
        num_samples: samples of an epoch.
        seed: chooses all permutations and all randomness of samples; not negative.

    Raises:
        UserError: if there are no samples, or the seed is negative.
    """

    num_samples: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise UserError(f"num_samples={self.num_samples!r} must be 1 or more; there is nothing to train on")
        if self.seed < 0:
            raise UserError(f"seed={self.seed!r} must be 0 or more")

    def index(self, position: int) -> int:
        """Which sample stands at a position; every epoch holds each sample once."""
        epoch, offset = divmod(position, self.num_samples)
        return int(_permutation(self.num_samples, self.seed, epoch)[offset])

    def rng(self, position: int) -> np.random.Generator:
        """Randomness of the sample at a position: caption choice, augmentation."""
        return np.random.default_rng((self.seed, _SAMPLE_STREAM, position))


@lru_cache(maxsize=4)
def _permutation(num_samples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, _ORDER_STREAM, epoch)).permutation(num_samples)


def rank_positions(*, start: int, stop: int, global_batch_size: int, rank: int, world_size: int) -> Iterator[list[int]]:
    """Positions of one rank's batches.

    Args:
        start: first position; a multiple of `global_batch_size`.
        stop: position at which the last batch ends.
        global_batch_size: B, a multiple of `world_size`.
        rank: of this process.
        world_size: number of processes.
    """
    for first in range(start, stop, global_batch_size):
        yield list(range(first + rank, first + global_batch_size, world_size))
