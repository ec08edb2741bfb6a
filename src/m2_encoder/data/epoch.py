"""What ranks and trainer make of the training samples: how long an epoch is, and that all ranks see the same."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from m2_encoder.errors import UserError


def limit_epoch(steps: int, limit: float) -> int:
    """Steps of an epoch that a number of batches, or a share, leaves of it; as Lightning's trainer counts."""
    return min(limit, steps) if isinstance(limit, int) else int(steps * limit)


def check_ranks(own: dict[str, str]) -> None:
    """Check that all ranks found the same shards.

    Raises:
        UserError: on all ranks, with the first difference.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    for rank, other in enumerate(found):
        changed = [key for key in sorted({*found[0], *other}) if other.get(key) != found[0].get(key)]
        if changed:
            raise UserError(
                f"data.sources: the ranks see other shards; {changed[0]}: {found[0].get(changed[0])} on rank 0, "
                f"{other.get(changed[0])} on rank {rank}; give all machines the same files, and start when none is "
                "being written"
            )
