"""Several processes give exactly the recalls of one, however unequal their shares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from m2_encoder.evaluation.measures.ranks import rank_both_ways
from m2_encoder.evaluation.measures.shards import rank_shards
from m2_encoder.evaluation.metrics import retrieval_metrics
from m2_encoder.evaluation.recall_metric import RetrievalRecall
from tests.support.ranks import run_ranks

# How many items the first process has of 40: half, a few, all of them (so that the others are never updated).
SPLITS = [20, 3, 40]


def make_items() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and their identities, texts and theirs; two images are the same, and one shows what another shows."""
    images, texts = torch.randn(2, 40, 12, generator=torch.Generator().manual_seed(3)).unbind()
    images[30] = images[2]
    identities = torch.arange(40)
    identities[39] = 4
    return images, identities, texts, (torch.arange(40) * 7) % 39


def share(rank: int, split: int) -> slice:
    """The items of a process: the first has the first ones, the others the rest in turns."""
    return slice(0, split) if rank == 0 else slice(split + rank - 1, None, max(1, dist.get_world_size() - 1))


def check_ranks(own_images: Tensor, own_rows: Tensor) -> None:
    """Ranks of all items, where right texts of an image and right images of a text are not the same pairs."""
    images, _, texts, _ = make_items()
    rows = torch.arange(40)
    pairs, back = torch.stack([rows, rows * 3 % 40], dim=1), torch.stack([rows[5:] * 7 % 40, rows[5:]], dim=1)
    found = rank_shards(texts, own_images, own_rows, pairs, back, num_images=40)
    for part, whole in zip(found, rank_both_ways(texts, images, pairs, back), strict=True):
        assert torch.equal(part.ranks, whole.ranks)
        assert torch.equal(part.ties, whole.ties)
        assert part.num_gallery == whole.num_gallery


def measure_share(rank: int) -> list[dict[str, float]]:
    """What a rank computes of each split; twice, since computing must not change the state."""
    found = []
    for split in SPLITS:
        metric = RetrievalRecall()
        mine = share(rank, split)
        images, image_ids, texts, text_ids = (part[mine] for part in make_items())
        if len(images):
            metric.update(images, image_ids, texts, text_ids)
        once, again = ({name: float(value) for name, value in metric.compute().items()} for _ in range(2))
        assert once == again
        found.append(once)
        check_ranks(images, torch.arange(40)[mine])
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_equal_one(tmp_path: Path, world_size: int) -> None:
    expected = {name: float(torch.tensor(value)) for name, value in retrieval_metrics(*make_items()).items()}
    for found in run_ranks(measure_share, world_size, folder=tmp_path):
        assert len(found) == len(SPLITS)
        assert all(one == expected for one in found)
