"""Counting steps that are skipped, and the diagnosis after too many."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import nn

from m2_encoder.errors import UserError
from m2_encoder.training.non_finite import NonFiniteError, NonFiniteGuard


def parameters(bad: int = 1, good: int = 1) -> list[tuple[str, nn.Parameter]]:
    named = []
    for index in range(bad + good):
        parameter = nn.Parameter(torch.zeros(2))
        parameter.grad = torch.tensor([1.0, math.nan if index < bad else 2.0])
        named.append((f"layer{index}.weight", parameter))
    named.append(("frozen", nn.Parameter(torch.zeros(1), requires_grad=False)))
    return named


def observe(guard: NonFiniteGuard, norm: float, *, step: int = 3, bad: int = 1) -> bool:
    losses = {"itc": torch.tensor(2.5), "cmlm": torch.tensor(math.inf)}
    return guard.observe(torch.tensor(norm), step=step, losses=losses, parameters=parameters(bad))


@pytest.mark.parametrize("norm", [math.nan, math.inf, -math.inf])
def test_only_what_is_not_finite_is_skipped(norm: float) -> None:
    guard = NonFiniteGuard(max_in_a_row=5)
    assert [observe(guard, n) for n in (0.0, norm, 1e30, norm, norm)] == [False, True, False, True, True]
    assert (guard.total, guard.in_a_row) == (3, 2)


def test_a_row_of_them_ends_in_one_line_with_the_diagnosis() -> None:
    guard = NonFiniteGuard(max_in_a_row=3)
    for step in (1, 2):
        assert observe(guard, math.nan, step=step)
    observe(guard, 1.0, step=3)
    for step in (4, 5):
        assert observe(guard, math.nan, step=step)
    with pytest.raises(NonFiniteError) as caught:
        observe(guard, math.nan, step=6, bad=7)
    message = str(caught.value)
    for words in (
        "3 steps in a row", "step 6", "itc=2.5", "cmlm=inf", "layer0.weight", "layer4.weight and 2 more",
        "optimizer.lr", "scheduler.warmup_steps", "trainer.precision",
    ):  # fmt: skip
        assert words in message, words
    assert "layer5" not in message
    assert "\n" not in message
    assert isinstance(caught.value, UserError), "commands show those without a traceback"


def test_every_skipped_step_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    guard = NonFiniteGuard(max_in_a_row=3)
    with caplog.at_level(logging.WARNING):
        observe(guard, math.nan, step=8)
        observe(guard, 1.0, step=9)
    (record,) = caplog.records
    assert "step 8" in record.getMessage()
    assert "1 in a row, 1 in all" in record.getMessage()


def test_an_overflow_of_the_norm_alone_names_no_parameter() -> None:
    guard = NonFiniteGuard(max_in_a_row=1)
    with pytest.raises(NonFiniteError, match="no single parameter"):
        observe(guard, math.inf, bad=0)


def test_counters_travel() -> None:
    guard, other = NonFiniteGuard(max_in_a_row=9), NonFiniteGuard(max_in_a_row=9)
    observe(guard, math.nan)
    observe(guard, 1.0)
    observe(guard, math.nan)
    other.load_state_dict(guard.state_dict())
    assert (other.total, other.in_a_row) == (2, 1)


@pytest.mark.parametrize("value", [0, -3])
def test_a_budget_below_one_is_named(value: int) -> None:
    with pytest.raises(UserError, match=f"max_skipped_in_a_row={value}"):
        NonFiniteGuard(max_in_a_row=value)
