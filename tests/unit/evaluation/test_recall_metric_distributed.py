"""Two processes give the recalls of one, however unequal their shares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from m2_encoder.evaluation.metrics import retrieval_metrics
from m2_encoder.evaluation.recall_metric import RetrievalRecall
from tests.support.ranks import run_ranks

# How many items the first process has of 40: half, a few, all of them (so that the other is never updated).
SPLITS = [20, 3, 40]


def make_items() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and their identities, texts and theirs; two images are the same."""
    images, texts = torch.randn(2, 40, 12, generator=torch.Generator().manual_seed(3)).unbind()
    images[30] = images[2]
    return images, torch.arange(40), texts, (torch.arange(40) * 7) % 40


def measure_share(rank: int) -> list[dict[str, float]]:
    """What a rank computes of each split; twice, since computing must not change the state."""
    found = []
    for split in SPLITS:
        metric = RetrievalRecall()
        mine = slice(0, split) if rank == 0 else slice(split, None)
        images, image_ids, texts, text_ids = (part[mine] for part in make_items())
        if len(images):
            metric.update(images, image_ids, texts, text_ids)
        once, again = ({name: float(value) for name, value in metric.compute().items()} for _ in range(2))
        assert once == again
        found.append(once)
    return found


def test_two_processes_equal_one(tmp_path: Path) -> None:
    expected = retrieval_metrics(*make_items())
    for found in run_ranks(measure_share, 2, folder=tmp_path):
        assert len(found) == len(SPLITS)
        assert all(one == pytest.approx(expected) for one in found)
