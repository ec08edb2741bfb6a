"""Clipping of whole gradients against torch's; split ones are compared in `tests/distributed`."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from m2_encoder.distributed.gradients import clip_gradients, whole_tensor


def parameters(seed: int, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    made = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((), (3,), (4, 5), (0, 2))]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return [*made, nn.Parameter(torch.zeros(2))]  # the last one has no gradient


@given(st.integers(0, 1000), st.floats(1e-3, 1e3) | st.just(math.inf))
def test_equals_torch(seed: int, max_norm: float) -> None:
    ours = parameters(seed)
    expected = copy.deepcopy(ours)
    for theirs, own in zip(expected, ours, strict=True):
        theirs.grad = None if own.grad is None else own.grad.clone()
    norm = nn.utils.clip_grad_norm_(expected, max_norm)
    torch.testing.assert_close(clip_gradients(ours, max_norm), norm)
    for own, theirs in zip(ours, expected, strict=True):
        if theirs.grad is None:
            assert own.grad is None
        else:
            torch.testing.assert_close(own.grad, theirs.grad)


def test_half_precision_is_summed_in_fp32() -> None:
    many = [nn.Parameter(torch.zeros(1, dtype=torch.bfloat16)) for _ in range(1000)]
    for parameter in many:
        parameter.grad = torch.ones(1, dtype=torch.bfloat16)
    assert clip_gradients(many).item() == pytest.approx(math.sqrt(1000), rel=1e-5)  # bf16 counts to 256


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_where_it_is(bad: float) -> None:
    made = parameters(0)
    assert made[1].grad is not None
    made[1].grad[0] = bad
    before = [None if p.grad is None else p.grad.clone() for p in made]
    assert not clip_gradients(made, 0.1).isfinite()
    for parameter, gradient in zip(made, before, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0, equal_nan=True)


def test_a_whole_tensor_is_itself() -> None:
    tensor = torch.ones(2)
    assert whole_tensor(tensor) is tensor
