"""The loss over ranks is that of one process which holds all rows: real gloo processes, fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from m2_encoder.distributed.collectives import gather_rows, gather_rows_without_grad
from m2_encoder.objectives.base import FeaturePair, ObjectiveInputs
from m2_encoder.objectives.contrastive import ImageTextContrastive
from tests.support.ranks import run_ranks

Result = dict[str, npt.NDArray[np.float64]]

ROWS = 3  # per rank
WIDTH, FEATURES = 5, 4
SMOOTHING = 0.1
TOLERANCE = 1e-12


class TwoTowers(nn.Module):
    """The least that has an image side, a text side and a scale."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.image = nn.Parameter(torch.randn(WIDTH, FEATURES, dtype=torch.float64, generator=generator))
        self.text = nn.Parameter(torch.randn(WIDTH, FEATURES, dtype=torch.float64, generator=generator))
        self.logit_scale = nn.Parameter(torch.tensor(1.7, dtype=torch.float64))

    def forward(self, images: Tensor, texts: Tensor, identity: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        objective = ImageTextContrastive(label_smoothing=SMOOTHING)
        inputs = ObjectiveInputs(
            {
                "features": FeaturePair(
                    nn.functional.normalize(images @ self.image, dim=1),
                    nn.functional.normalize(texts.flatten(0, 1) @ self.text, dim=1),
                    self.logit_scale,
                )
            },
            identity,
            group,
        )
        return objective(inputs).loss


def data(ranks: int, captions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of all ranks, texts (images, captions, width); some identities repeat within a rank, others across ranks."""
    generator = torch.Generator().manual_seed(11)
    images = torch.randn(ranks * ROWS, WIDTH, dtype=torch.float64, generator=generator)
    texts = torch.randn(ranks * ROWS, captions, WIDTH, dtype=torch.float64, generator=generator)
    identity = torch.tensor([4, 1, 4, 2, 1, 3, 5, 6, 1, 4, 8, 8][: ranks * ROWS])
    return images, texts, identity


def train_rank(rank: int, world_size: int, group_size: int, captions: int) -> Result:
    """One backward of a rank under DDP, whose contrastive group is `group_size` neighbouring ranks."""
    groups = [dist.new_group(list(range(g, g + group_size))) for g in range(0, world_size, group_size)]
    group = groups[rank // group_size]
    model = nn.parallel.DistributedDataParallel(TwoTowers())
    rows = slice(rank * ROWS, (rank + 1) * ROWS)
    images, texts, identity = (side[rows] for side in data(world_size, captions))
    loss = model(images, texts, identity, group)
    loss.backward()
    gradients = {name: p.grad.numpy() for name, p in model.module.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().numpy(), **gradients}


def alone(world_size: int, group_size: int, captions: int) -> Result:
    """The same in one process: the mean over groups of the loss of all rows of a group."""
    model = TwoTowers()
    losses = []
    for start in range(0, world_size * ROWS, group_size * ROWS):
        rows = slice(start, start + group_size * ROWS)
        images, texts, identity = (side[rows] for side in data(world_size, captions))
        losses.append(model(images, texts, identity, None))
    loss = torch.stack(losses).mean()
    loss.backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().numpy(), **gradients}


@pytest.mark.parametrize(("world_size", "group_size", "captions"), [(2, 2, 1), (4, 4, 2), (4, 2, 1), (2, 1, 2)])
def test_ranks_equal_one_process(world_size: int, group_size: int, captions: int, tmp_path: Path) -> None:
    results = run_ranks(train_rank, world_size, world_size, group_size, captions, folder=tmp_path)
    expected = alone(world_size, group_size, captions)
    assert set(expected) == {"loss", "image", "text", "logit_scale"}
    mean_loss = np.mean([result["loss"] for result in results])
    np.testing.assert_allclose(mean_loss, expected["loss"], rtol=0, atol=TOLERANCE)
    for name in ("image", "text", "logit_scale"):
        for result in results:
            np.testing.assert_allclose(result[name], expected[name], rtol=0, atol=TOLERANCE, err_msg=name)
        assert np.abs(expected[name]).max() > 1e-3, "a gradient near 0 would prove nothing"


def gather_in_groups(rank: int, members: list[list[int]]) -> dict[str, Any]:
    """Gather and its backward in overlapping-free sub-groups that do not start at rank 0."""
    groups = [dist.new_group(ranks) for ranks in members]
    own = next(index for index, ranks in enumerate(members) if rank in ranks)
    rows = (torch.arange(4, dtype=torch.float64).reshape(2, 2) + 100 * rank).requires_grad_()
    gathered = gather_rows(rows, groups[own])
    # Every rank weighs every gathered entry differently, so that a wrong order or a missing sum shows.
    weights = torch.arange(gathered.numel(), dtype=torch.float64).reshape(gathered.shape) + 1000 * rank
    (gathered * weights).sum().backward()
    transposed = torch.cat(gather_rows_without_grad(rows.t(), groups[own], counts=[2, 2]))  # not contiguous
    keys = torch.cat(gather_rows_without_grad(torch.tensor([rank, -(2**60) - rank]), groups[own], counts=[2, 2]))
    assert rows.grad is not None
    assert not transposed.requires_grad
    return {
        "gathered": gathered.detach().numpy(),
        "grad": rows.grad.numpy(),
        "transposed": transposed.numpy(),
        "keys": keys.tolist(),
    }


def test_gather_and_its_gradient_in_groups_that_do_not_start_at_rank_0(tmp_path: Path) -> None:
    members = [[0, 2], [1, 3]]
    results = run_ranks(gather_in_groups, 4, members, folder=tmp_path)
    for ranks in members:
        blocks = [np.arange(4.0).reshape(2, 2) + 100 * rank for rank in ranks]
        for place, rank in enumerate(ranks):
            result = results[rank]
            np.testing.assert_array_equal(result["gathered"], np.concatenate(blocks))
            np.testing.assert_array_equal(result["transposed"], np.concatenate([block.T for block in blocks]))
            assert result["keys"] == [key for other in ranks for key in (other, -(2**60) - other)]
            own = np.arange(8.0).reshape(4, 2)[2 * place : 2 * place + 2]
            np.testing.assert_array_equal(result["grad"], sum(own + 1000 * other for other in ranks))
