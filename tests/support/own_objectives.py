"""Objectives as users write them: right ones, and ones that a model does not fit."""

from __future__ import annotations

import torch
from torch import nn

from m2_encoder.errors import UserError
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.objectives.base import Objective, ObjectiveInputs, ObjectiveOutput
from m2_encoder.objectives.patch_targets import NormalizedPixels
from m2_encoder.objectives.schedule import Schedule


class WideOnly(Objective):
    """Refuses narrow models as soon as it is built."""

    def build(self, shape: M2EncoderConfig) -> None:
        if shape.embed_dim < 1000:
            raise UserError(f"embed_dim={shape.embed_dim} is too narrow; use 1000 or more")

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        raise NotImplementedError


class LooksInside(WideOnly):
    """Its build looks into tensors, and draws random numbers."""

    def build(self, shape: M2EncoderConfig) -> None:
        self.head = nn.Linear(shape.embed_dim, shape.feature_dim)
        assert torch.rand(3).sum().item() >= 0


class Broken(WideOnly):
    """Asks for something that models do not have."""

    def build(self, shape: M2EncoderConfig) -> None:
        self.head = nn.Linear(shape.width, 1)  # type: ignore[attr-defined]


class Picky(WideOnly):
    """Refuses an argument of its own."""

    def __init__(self, *, margin: float = 0.2, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        if margin < 0:
            raise UserError("must be 0 or more", key="margin", value=margin)


class Prototypes(Objective):
    """Pulls images towards the nearest of some vectors of its own."""

    def __init__(
        self, *, rows: int = 4, sharpness: float = 1.0, weight: float = 1.0, schedule: Schedule | None = None
    ) -> None:
        super().__init__(weight=weight, schedule=schedule)
        self._rows, self._sharpness = rows, sharpness

    def build(self, shape: M2EncoderConfig) -> None:
        self.table = nn.Parameter(torch.randn(self._rows, shape.feature_dim))

    def forward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        nearest = (inputs.image_features @ self.table.t() * self._sharpness).amax(dim=1)
        loss = 1 - nearest.mean() + inputs.logit_scale * 0
        return ObjectiveOutput(loss=loss, per_sample=loss.detach().expand(len(inputs.text_features)))


class FromFile(Prototypes):
    """Needs values as soon as it is built."""

    def build(self, shape: M2EncoderConfig) -> None:
        super().build(shape)
        self.first = float(self.table.detach()[0, 0])


def make_nothing() -> str:
    """Makes no objective."""
    return "nothing"


class Brightness(NormalizedPixels):
    """Targets of another width."""

    def build(self, shape: M2EncoderConfig) -> None:
        super().build(shape)
        self.head = nn.Linear(shape.embed_dim, 1)
