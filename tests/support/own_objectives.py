"""Objectives as users write them: right ones, and ones that a model does not fit."""

from __future__ import annotations

import torch
from torch import nn

from m2_encoder.errors import UserError
from m2_encoder.objectives.base import ModelShape, Objective, ObjectiveInputs, ObjectiveOutput


class WideOnly(Objective):
    """Refuses narrow models as soon as it is built."""

    def build(self, shape: ModelShape) -> None:
        if shape.embed_dim < 1000:
            raise UserError(f"embed_dim={shape.embed_dim} is too narrow; use 1000 or more")

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        raise NotImplementedError


class LooksInside(WideOnly):
    """Its build looks into tensors, and draws random numbers."""

    def build(self, shape: ModelShape) -> None:
        self.head = nn.Linear(shape.embed_dim, shape.feature_dim)
        assert torch.rand(3).sum().item() >= 0


class Broken(WideOnly):
    """Asks for something that models do not have."""

    def build(self, shape: ModelShape) -> None:
        self.head = nn.Linear(shape.width, 1)  # type: ignore[attr-defined]


class Picky(WideOnly):
    """Refuses an argument of its own."""

    def __init__(self, *, margin: float = 0.2, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        if margin < 0:
            raise UserError(f"margin={margin} must be 0 or more")


def make_nothing() -> str:
    """Makes no objective."""
    return "nothing"
