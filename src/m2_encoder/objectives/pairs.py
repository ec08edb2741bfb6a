"""The third kind of objective: right and wrong pairs, looked at after the features of all rows are known.

First `select` chooses wrong partners by the features, once per step. Then the pairs go through the vision-language
layers piece by piece, inside micro-batches and their recomputation, as for a `LocalObjective`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple, Protocol

from torch import Tensor

from m2_encoder.bounds import NotNegative
from m2_encoder.objectives.base import LocalTerms, Objective, ObjectiveInputs, fused_parts
from m2_encoder.objectives.schedule import Schedule
from m2_encoder.types import TextTokens


class HardPairs(NamedTuple):
    """Wrong partners, one of each kind per caption of a rank.

    Attributes:
        text: captions that do not describe the caption's image, (k * B, T).
        has_text: False where the group had none, (k * B,) bool.
        image_rows: images of this rank that the caption does not describe, (k * B,) int64 in 0..B-1.
        has_image: False where the rank had none, (k * B,) bool.
    """

    text: TextTokens
    has_text: Tensor
    image_rows: Tensor
    has_image: Tensor


class PairPasses(Protocol):
    """Images and captions of one piece in the vision-language layers, rightly and wrongly paired.

    Each is the state of the caption's first token, which sees the whole image and the whole caption, (k * b, D).
    """

    @property
    def matched(self) -> Tensor:
        """Every caption beside its image."""
        ...

    @property
    def wrong_text(self) -> Tensor:
        """Every caption's image beside a wrong caption; meaningless where there is none."""
        ...

    @property
    def wrong_image(self) -> Tensor:
        """Every caption beside a wrong image; meaningless where there is none."""
        ...

    @property
    def has_text(self) -> Tensor:
        """See `HardPairs`, (k * b,) bool."""
        ...

    @property
    def has_image(self) -> Tensor:
        """See `HardPairs`, (k * b,) bool."""
        ...


class PairObjective(Objective):
    """A loss of right and wrong pairs: the mean over the terms of all ranks. It trains no features, only asks them.

    Args:
        weight: factor in the sum of objectives.
        schedule: see `Objective`.
        text_expert: see `LocalObjective`.

    Attributes:
        score_names: names of the scores that `terms` gives, always all of them.
    """

    score_names: tuple[str, ...] = ()

    def __init__(
        self, *, weight: NotNegative = 1.0, schedule: Schedule | None = None, text_expert: bool = False
    ) -> None:
        super().__init__(weight=weight, schedule=schedule)
        self.text_expert = text_expert

    def trained_parts(self) -> frozenset[str]:
        """Names of `PARTS` that get a gradient of this objective."""
        return self.optional_parts | fused_parts(text_expert=self.text_expert, reads=["caption"])

    @abstractmethod
    def select(self, inputs: ObjectiveInputs) -> HardPairs:
        """Choose wrong partners, once per step; collective in the group, without gradients."""

    @abstractmethod
    def terms(self, passes: PairPasses) -> LocalTerms:
        """Compute the terms of a piece; runs again in backward where micro-batches are recomputed."""

    def forward(self, inputs: PairPasses) -> LocalTerms:  # type: ignore[override]  # another kind of input
        """As `terms`."""
        return self.terms(inputs)
