"""Weights of objectives."""

from __future__ import annotations

import pytest
import torch

from m2_encoder.errors import UserError
from m2_encoder.objectives.base import Objective, ObjectiveInputs, ObjectiveOutput


class Constant(Objective):
    def forward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        return ObjectiveOutput(torch.tensor(1.0), torch.ones(1))


def test_without_a_schedule_the_weight_stays() -> None:
    assert {Constant(weight=0.3).weight_at(step) for step in (0, 10, 10_000)} == {0.3}


def test_a_schedule_multiplies_the_weight() -> None:
    for schedule in ([[0, 0], [10, 1]], [[10, 1], [0, 0]], {0: 0, 10: 1}, {"0": 0, "10": 1}):
        assert [Constant(weight=0.5, schedule=schedule).weight_at(step) for step in (0, 4, 99)] == [0, 0.2, 0.5]


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_senseless_weights_are_refused(weight: float) -> None:
    with pytest.raises(UserError, match="must be a number, 0 or more"):
        Constant(weight=weight)
