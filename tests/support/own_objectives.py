"""Objectives that are none of the package's, as a user writes them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from m2_encoder.objectives.base import ModelShape, Objective, ObjectiveInputs, ObjectiveOutput


class Prototypes(Objective):
    """Pulls images towards the nearest of some vectors of its own."""

    def __init__(
        self, *, rows: int = 4, sharpness: float = 1.0, weight: float = 1.0, schedule: Mapping[int, float] | None = None
    ) -> None:
        super().__init__(weight=weight, schedule=schedule)
        self._rows, self._sharpness = rows, sharpness

    def build(self, shape: ModelShape) -> None:
        self.table = nn.Parameter(torch.randn(self._rows, shape.feature_dim))

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        nearest = (inputs.image_features @ self.table.t() * self._sharpness).amax(dim=1)
        loss = 1 - nearest.mean() + inputs.logit_scale * 0
        return ObjectiveOutput(loss=loss, per_sample=loss.detach().expand(len(inputs.text_features)))


class FromFile(Prototypes):
    """Needs values as soon as it is built."""

    def build(self, shape: ModelShape) -> None:
        super().build(shape)
        self.first = float(self.table.detach()[0, 0])
