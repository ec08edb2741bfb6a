"""Which positions a rank trains on.

Every sample that a run ever sees has a position, counted over all ranks from 0. Batch t of rank r of R holds the
positions t*B + r, t*B + r + R, ... (B: global batch size). What stands at a position is said by
`m2_encoder.data.order.plan`; it depends on neither ranks nor workers, so one integer resumes a run.
"""

from __future__ import annotations

from collections.abc import Iterator


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
