"""What an objective is: a loss on the passes it names, with a weight.

To add one: write a subclass in a file of this folder and a YAML file in `conf/objective/` that names it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor, nn

from m2_encoder.errors import UserError


class FeaturePair(NamedTuple):
    """Features of one head of the model, and their temperature.

    Attributes:
        image_features: (B, E), L2-normalised.
        text_features: (k * B, E), L2-normalised; k captions per image, row j describes image j // k.
        logit_scale: log of the inverse temperature, ().
    """

    image_features: Tensor
    text_features: Tensor
    logit_scale: Tensor


class ObjectiveInputs(NamedTuple):
    """What the training module hands to every objective.

    Attributes:
        heads: by name of `EncoderOutput`: "features", and "backbone_features" if an objective trains that part.
        identity: equal numbers mark the same content, (B,) int64.
        group: ranks whose rows serve as negatives; None for this rank alone.
    """

    heads: Mapping[str, FeaturePair]
    identity: Tensor
    group: dist.ProcessGroup | None

    @property
    def image_features(self) -> Tensor:
        """The embedding of the images, (B, E), L2-normalised."""
        return self.heads["features"].image_features

    @property
    def text_features(self) -> Tensor:
        """The embedding of the texts, (k * B, E), L2-normalised; row j describes image j // k."""
        return self.heads["features"].text_features

    @property
    def logit_scale(self) -> Tensor:
        """Log of the inverse temperature of both, ()."""
        return self.heads["features"].logit_scale


class ObjectiveOutput(NamedTuple):
    """A loss and its parts.

    Attributes:
        loss: mean over the local rows, (), fp32, unweighted.
        per_sample: loss of each local caption, (k * B,) fp32, detached; logged per language.
    """

    loss: Tensor
    per_sample: Tensor


class Objective(nn.Module, ABC):
    """A loss of one optimizer step.

    Args:
        weight: factor in the sum of objectives; finite, not negative. With 0 the objective is left out of a run.

    Attributes:
        optional_parts: names of `m2_encoder.models.m2_encoder.OPTIONAL_PARTS` that this objective trains. Parts that no
            objective of a run names are frozen, so that no rank waits for a gradient that never comes.
    """

    optional_parts: frozenset[str] = frozenset()

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        if not 0 <= weight < math.inf:
            raise UserError(f"objective weight={weight!r} must be 0 or more, and finite")
        self.weight = weight

    @abstractmethod
    def forward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """Compute the loss of the local rows."""
