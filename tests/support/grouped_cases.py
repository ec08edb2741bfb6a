"""Training steps of a small encoder over grouped ranks and micro-batches, and the same in one process by plain means.

Dropout and stochastic depth are on. Random numbers belong to rows: rank r starts from a seed of its own and draws for
its image pieces and then its text pieces; the single process draws the same numbers, rank by rank and piece by piece.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from m2_encoder.objectives import encode_pieces, image_text_contrastive
from tests.support.plain_contrastive import world_loss
from tests.support.rank_pool import Seat

Result = dict[str, npt.NDArray[Any]]
INPUTS = 6


class Case(NamedTuple):
    """One step. `rows` are images of each rank in one micro-batch; a world is as large as it is long."""

    rows: tuple[int, ...]
    group_size: int
    micro_batches: int = 1
    width: int = 5
    captions: int = 1
    heads: int = 1
    identities: int | None = None
    smoothing: float = 0.0
    log_scales: tuple[float, ...] = (1.9, 2.6)
    dtype: str = "float64"
    recompute: bool = True
    equal_rows: bool = False
    one_sided: bool = False
    seed: int = 0

    @property
    def world_size(self) -> int:
        return len(self.rows)

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


class Towers(nn.Module):
    """An image and a text side with several heads, dropout, and a residual branch with stochastic depth."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(case.seed)

        def draw(*shape: int) -> nn.Parameter:
            values = torch.randn(shape, dtype=torch.float64, generator=generator)
            return nn.Parameter(values.to(case.torch_dtype))

        self.branches = nn.ParameterList([draw(INPUTS, INPUTS) for _ in range(2)])
        self.heads = nn.ParameterList([draw(INPUTS, case.width) for _ in range(2 * case.heads)])
        self.scales = nn.ParameterList(
            [nn.Parameter(torch.tensor(s, dtype=case.torch_dtype)) for s in case.log_scales[: case.heads]]
        )

    def encode(self, side: int, rows: Tensor) -> tuple[Tensor, ...]:
        """Unit features of every head; side 0 is images, 1 texts."""
        rows = nn.functional.dropout(rows, 0.2)
        kept = torch.empty(len(rows), 1, dtype=rows.dtype).bernoulli_(0.7) / 0.7
        rows = rows + kept * torch.tanh(rows @ self.branches[side]) + 0.1  # no row is all zero
        return tuple(nn.functional.normalize(rows @ head, dim=1) for head in self.heads[side::2])


class GroupedStep(nn.Module):
    """What a rank does: encode in pieces, one loss over all its rows."""

    def __init__(self, case: Case, group: Any) -> None:
        super().__init__()
        self.towers, self.case, self.group = Towers(case), case, group

    def forward(self, images: Tensor, texts: Tensor, identity: Tensor | None) -> Tensor:
        k, towers = self.case.micro_batches, self.towers
        sides = [
            encode_pieces(
                lambda piece, side=side: towers.encode(side, piece),
                list(rows.chunk(k)),
                recompute=self.case.recompute,
            )
            for side, rows in enumerate((images, texts))
        ]
        return image_text_contrastive(
            *sides,
            list(towers.scales),
            group=self.group,
            identity=identity,
            captions_per_image=self.case.captions,
            label_smoothing=self.case.smoothing,
            equal_rows=self.case.equal_rows,
            one_sided=self.case.one_sided,
        )


def rank_rows(case: Case, rank: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Images, texts and identities that a rank trains on."""
    generator = torch.Generator().manual_seed(1000 * case.seed + rank)
    count = case.rows[rank] * case.micro_batches
    images = torch.randn(count, INPUTS, dtype=torch.float64, generator=generator).to(case.torch_dtype)
    texts = torch.randn(count * case.captions, INPUTS, dtype=torch.float64, generator=generator).to(case.torch_dtype)
    if case.identities is None:
        return images, texts, None
    # As fp32 bits these are subnormal numbers, NaNs and infinities: identities must arrive untouched all the same.
    names = torch.tensor([1, -1, 2**52 + 1, -(2**62), 0x7F800001, 0x7FF0000000000001, 0, 2**63 - 1])
    return images, texts, names[torch.randint(0, case.identities, (count,), generator=generator)]


def train_step(seat: Seat, case: Case) -> Result | None:
    """One step of a rank under DDP; None for a rank outside of the world."""
    if seat.rank >= case.world_size:
        return None
    group = seat.group(case.group_size) if case.group_size > 1 else None
    step = nn.parallel.DistributedDataParallel(GroupedStep(case, group), process_group=seat.group(case.world_size))
    torch.manual_seed(77 * case.seed + seat.rank)
    loss = step(*rank_rows(case, seat.rank))
    loss.backward()
    drawn = torch.rand(())  # recomputation must leave the random state where it was
    return {"loss": loss.detach().numpy(), "draw": drawn.numpy(), **_gradients(step.module.towers)}


def step_alone(case: Case) -> Result:
    """The same step in one process that holds all rows, from the formula."""
    towers = Towers(case)
    images: list[list[Tensor]] = [[] for _ in range(case.heads)]
    texts: list[list[Tensor]] = [[] for _ in range(case.heads)]
    identity: list[Tensor] = []
    draws = []
    for rank in range(case.world_size):
        torch.manual_seed(77 * case.seed + rank)
        image_rows, text_rows, names = rank_rows(case, rank)
        for side, (rows, features) in enumerate(((image_rows, images), (text_rows, texts))):
            pieces = [towers.encode(side, piece) for piece in rows.chunk(case.micro_batches)]
            for head in range(case.heads):
                features[head].append(torch.cat([piece[head] for piece in pieces]))
        identity += [] if names is None else [names]
        draws.append(torch.rand(()))
    losses = [
        world_loss(
            images[head],
            texts[head],
            towers.scales[head],
            group_size=case.group_size,
            identity=identity or None,
            smoothing=case.smoothing,
        )
        for head in range(case.heads)
    ]
    loss = torch.stack(losses).mean()
    loss.backward()
    return {"loss": loss.detach().numpy(), "draw": torch.stack(draws).numpy(), **_gradients(towers)}


def deviation(case: Case, results: list[Result | None], expected: Result) -> float:
    """The largest relative deviation of the mean loss, and of any gradient on any rank, each by its largest entry.

    What is 0 but for rounding (as all of it is with a single row) counts by a tenth of exp(logit_scale): gradients of
    that size cancel in it.
    """
    ranks = [result for result in results if result is not None]
    np.testing.assert_array_equal([result["draw"] for result in ranks], expected["draw"])
    loss = np.mean([result["loss"] for result in ranks], dtype=np.float64)
    worst = abs(loss - expected["loss"]) / max(abs(expected["loss"]), 0.1)
    names = expected.keys() - {"loss", "draw"}
    floor = 0.1 * math.exp(max(case.log_scales[: case.heads]))
    for name in names:
        size = max(floor, np.abs(expected[name]).max())
        for result in ranks:
            worst = max(worst, np.abs(result[name] - expected[name]).max() / size)
    return float(worst)


def _gradients(towers: Towers) -> Result:
    gradients = {name: p.grad for name, p in towers.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values()), f"no gradient: {gradients}"
    return {name: gradient.numpy() for name, gradient in gradients.items() if gradient is not None}
