"""What `m2-train` says about the contrastive batch."""

from __future__ import annotations

from typing import Any

import pytest

from m2_encoder.cli.train import describe_batch


@pytest.mark.parametrize(
    ("strategy", "ranks", "per_node", "expected"),
    [
        ({"micro_batches": 4}, 1, 1, "1 rank x 4 micro-batches x 32 rows = 128 rows in one group"),
        (
            {"group_size": 2, "micro_batches": 4},
            4,
            4,
            "2 ranks x 4 micro-batches x 8 rows = 64 rows in each of 2 groups",
        ),
        ({"group_nodes": 1}, 8, 4, "4 ranks x 1 micro-batch x 16 rows = 64 rows in each of 2 groups"),
        ({"group_size": 1}, 2, 2, "1 rank x 1 micro-batch x 64 rows = 64 rows in each of 2 groups"),
    ],
)
def test_batch_in_words(strategy: dict[str, Any], ranks: int, per_node: int, expected: str) -> None:
    cfg = {"strategy": strategy, "data": {"global_batch_size": 128}}
    assert describe_batch(cfg, world_size=ranks, ranks_per_node=per_node) == f"contrastive batch: {expected}"
