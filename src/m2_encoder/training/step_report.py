"""Values logged of a step: mean losses over all ranks by objective and language, and shares of languages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from m2_encoder.objectives.base import ObjectiveOutput
from m2_encoder.types import LANGUAGES


class StepReport(NamedTuple):
    """Means over all ranks; detached fp32 scalars."""

    losses: dict[str, Tensor]  # by objective, and by `<objective>_<language>`; NaN for a language without terms
    scores: dict[str, Tensor]  # by `<score>/<objective>` and `<score>/<objective>_<language>`
    shares: dict[str, Tensor]  # of the captions that are in each language, by language


def report_step(outputs: Mapping[str, ObjectiveOutput], language: Tensor) -> StepReport:
    """Means over the terms of all ranks; collective, so every rank calls it with the same objectives.

    Takes one small all-reduce, and no synchronisation with the device.

    Args:
        outputs: by objective.
        language: index into `LANGUAGES` of each local caption, (k * B,) int64.
    """
    selected = torch.stack([language == index for index in range(len(LANGUAGES))])
    parts = [selected.sum(dim=1).float()]
    names: list[tuple[bool, str]] = []
    for name, output in outputs.items():
        losses = {name: output.per_sample}
        scores = {f"{score}/{name}": values for score, values in output.scores.items()}
        for key, values in (losses | scores).items():
            names.append((key in losses, key))
            parts += [output.loss.detach().float().reshape(1), *_sum_by_language(values, output.counts, selected)]
    totals = torch.cat(parts)
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks > 1:
        dist.all_reduce(totals)
    rows, *quantities = totals.split([len(LANGUAGES), *[1, len(LANGUAGES), len(LANGUAGES)] * len(names)])
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for (is_loss, name), loss, sums, counts in zip(
        names, quantities[::3], quantities[1::3], quantities[2::3], strict=True
    ):
        means = found[0] if is_loss else found[1]
        means[name] = loss[0] / ranks if is_loss else sums.sum() / counts.sum()
        means |= {f"{name}_{code}": mean for code, mean in zip(LANGUAGES, sums / counts, strict=True)}
    return StepReport(*found, dict(zip(LANGUAGES, rows / rows.sum(), strict=True)))


def _sum_by_language(values: Tensor, counts: Tensor | None, selected: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the terms of each language, and how many there are, (languages,) fp32 each."""
    terms = selected if counts is None else selected * counts
    # Not a product with the selection: a NaN in one language would spread to the other.
    weighted = values.detach().float() * (1 if counts is None else counts)
    return torch.where(selected, weighted, 0.0).sum(dim=1), terms.sum(dim=1).float()
