"""Comparing two computations of the same numbers, in units that hold on any processor and for any number of threads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rounding(expected: Any, *, ulps: float, dtype: torch.dtype | None = None) -> float:
    """`ulps` units in the last place of the largest of some numbers; inf and nan do not count."""
    values = torch.as_tensor(expected).detach()
    sizes = values[values.isfinite()].abs()
    size = float(sizes.max()) if sizes.numel() else 0.0
    return ulps * torch.finfo(dtype or values.dtype).eps * size


def assert_close_in_ulps(actual: Any, expected: Any, *, ulps: float = 64, msg: str | None = None) -> None:
    """Fail where two tensors, arrays or numbers differ by more than rounding explains.

    How a product or a sum is rounded depends on the order of its terms, which every kernel chooses for itself: by
    instruction set, shape and threads. Its error grows with the terms, not with the result. So the unit is the last
    place of the largest number expected, for all of them: a test that says `ulps=64` holds whether features are about
    1 or hidden states about 1000, and a wrong formula misses by millions.

    Args:
        ulps: how many units, of the less exact of both types. A layer or two need a dozen.
        msg: what was compared.
    """
    ours, theirs = (torch.as_tensor(values).detach() for values in (actual, expected))
    coarse = max((ours.dtype, theirs.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    precise: list[Tensor] = [ours.double(), theirs.double()]
    allowed = rounding(theirs, ulps=ulps, dtype=coarse)
    named = None if msg is None else (lambda text: f"{msg}: {text}")
    torch.testing.assert_close(*precise, rtol=0, atol=allowed, equal_nan=True, msg=named)
