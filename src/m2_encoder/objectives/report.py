"""What is logged of a step: mean losses over all ranks, per objective and language, and the shares of languages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from m2_encoder.objectives.base import ObjectiveOutput
from m2_encoder.types import LANGUAGES


class StepReport(NamedTuple):
    """Means over all ranks; detached fp32 scalars.

    Attributes:
        losses: by objective, and by `<objective>_<language>`; NaN for a language without rows.
        shares: of the rows that are in each language, by language.
    """

    losses: dict[str, Tensor]
    shares: dict[str, Tensor]


def report_step(outputs: Mapping[str, ObjectiveOutput], language: Tensor) -> StepReport:
    """Means over the rows of all ranks; collective, so every rank calls it with the same objectives.

    One small reduction for all of them, and no synchronisation with the device.

    Args:
        outputs: by objective; at least one.
        language: index into `LANGUAGES` of each local row, (B,) int64.
    """
    selected = torch.stack([language == index for index in range(len(LANGUAGES))])
    rows = []
    for output in outputs.values():
        losses = output.per_sample.detach().float()
        # Not a product with the selection: a NaN in one language would spread to the other.
        sums = torch.where(selected, losses, 0.0).sum(dim=1)
        rows.append(torch.cat([output.loss.detach().float().reshape(1), sums, selected.sum(dim=1)]))
    totals = torch.stack(rows)
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks > 1:
        dist.all_reduce(totals)
    means: dict[str, Tensor] = {}
    for name, row in zip(outputs, totals, strict=True):
        means[name] = row[0] / ranks
        sums, counts = row[1:].chunk(2)
        means |= {f"{name}_{code}": mean for code, mean in zip(LANGUAGES, sums / counts, strict=True)}
    counts = totals[0, -len(LANGUAGES) :]
    return StepReport(means, dict(zip(LANGUAGES, counts / counts.sum(), strict=True)))
