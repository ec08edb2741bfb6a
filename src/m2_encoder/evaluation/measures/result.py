"""What every measure returns, and what every measure refuses.

Letters: n items · E feature dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from m2_encoder.errors import UserError


class Measurement(NamedTuple):
    """One number."""

    metric: str  # such as "t2i_r@1"
    value: float  # recalls, accuracies and precisions in percent
    n: int  # queries, images or pairs that it is a mean of
    low: float | None = None  # bounds of its 95 % interval; None where the measure has none
    high: float | None = None
    chance: float | None = None  # what a model that knows nothing scores, in the unit of `value`
    ties: float | None = None  # percent of the queries whose right answer ties with a wrong one, which goes first


def check_finite(features: Mapping[str, Tensor]) -> None:
    """Refuses features that are not finite, (n, E) by what they are of; numbers would hide that the model is broken.

    Raises:
        UserError: it says how many.
    """
    for side, values in features.items():
        largest = torch.linalg.vector_norm(values, ord=torch.inf, dim=1)  # without a copy of all that is compared
        if broken := int((~largest.isfinite()).sum()):
            raise UserError(f"{broken} of {len(values)} {side} features are not finite: the model is broken")


def check_same_width(features: Mapping[str, Tensor]) -> None:
    """Refuses sides that cannot be compared.

    Raises:
        UserError: unless all are (n, E) with the same E, and none is empty.
    """
    shapes = {side: tuple(values.shape) for side, values in features.items()}
    if any(len(shape) != 2 or not shape[0] for shape in shapes.values()) or len({s[1] for s in shapes.values()}) > 1:
        said = ", ".join(f"{side} features {shape}" for side, shape in shapes.items())
        raise UserError(f"{said}: all must be (n, E) with one E, and hold at least one row")


def check_pairs(pairs: Tensor, first: tuple[str, int], second: tuple[str, int]) -> Tensor:
    """Distinct pairs of rows, (P, 2) int64 on the CPU; `first` and `second` are names and lengths of the sides.

    Raises:
        UserError: for another shape, none at all, or rows that do not exist.
    """
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.is_floating_point() or not len(pairs):
        raise UserError(
            f"pairs are {tuple(pairs.shape)} {pairs.dtype}; they must be (P, 2) whole numbers, at least one"
        )
    pairs = pairs.long().cpu().unique(dim=0)
    for column, (side, number) in enumerate((first, second)):
        rows = pairs[:, column]
        if int(rows.min()) < 0 or int(rows.max()) >= number:
            wrong = int(rows[(rows < 0) | (rows >= number)][0])
            raise UserError(f"a pair names {side} row {wrong}; there are {number:,} {side} rows, from 0")
    return pairs
