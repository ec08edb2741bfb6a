"""What an objective is: a loss on the passes it names, with a weight.

There are three kinds. An `Objective` compares features of all rows of a contrastive group. A `LocalObjective` looks at
hidden states of single pairs: it is evaluated piece by piece, inside micro-batches and their recomputation, and gives a
sum and a count for every caption, so that its mean over all ranks is exact however the rows are divided. A
`PairObjective` does so in a second round, with hard negatives selected by the features of all rows.

To add one: write a subclass in a file of this folder and a YAML file in `conf/objective/` that names it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Final, NamedTuple, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from m2_encoder.bounds import NotNegative, check_bounds
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.objectives.files import FileKind, Resources
from m2_encoder.objectives.passes import HardPairs, PiecePairs, PiecePasses
from m2_encoder.objectives.schedule import Schedule, check_schedule, interpolate_schedule
from m2_encoder.types import ImageTextBatch

PASSES: Final = ("masked_text", "masked_image", "caption")
"""Passes of the model beyond the clean image and the clean text, which every objective has: the image with its captions
in which words are hidden; the captions with their image in which patches are hidden; the image with its captions, each
token seeing the ones before it alone."""


class FeaturePair(NamedTuple):
    """Features of one head of the model, and their temperature."""

    image_features: Tensor  # (B, E), L2-normalised
    text_features: Tensor  # (k * B, E), L2-normalised; k captions per image, row j describes image j // k
    logit_scale: Tensor  # log of the inverse temperature, ()


class ObjectiveInputs(NamedTuple):
    """What the training module hands to every objective."""

    # by name of `EncoderOutput`: "features", and "backbone_features" if an objective trains that part
    heads: Mapping[str, FeaturePair]
    identity: Tensor  # equal numbers mark the same content, (B,) int64
    group: dist.ProcessGroup | None  # ranks whose rows serve as negatives; None for this rank alone
    batch: ImageTextBatch | None = None  # the rows themselves; None only where features come from elsewhere
    step: int = 0  # updates done so far

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
    """A loss and its parts."""

    loss: Tensor  # of the local rows, (), fp32, unweighted; its mean over the ranks is the loss of the step
    per_sample: Tensor  # loss of each local caption, (k * B,) fp32, detached; logged per language
    counts: Tensor | None = None  # how many terms each of them is the mean of, (k * B,); None for one each
    # more means over the same terms, such as an accuracy, by name, (k * B,) each, detached
    scores: Mapping[str, Tensor] = {}


class Objective(nn.Module, ABC):
    """A loss of one optimizer step.

    Args:
        weight: factor in the sum of objectives; finite, not negative. With 0 the objective is left out of a run.
        schedule: factor of the weight by step, [[step, factor], ...], linear in between and constant beyond; None for
            1 always. Steps at which it is 0 cost nothing. Step s counts the updates before it.

    Attributes:
        optional_parts: names of `m2_encoder.models.trainable_parts.PARTS` that this objective trains beside those that
            all of its kind do. Parts that no objective of a run names are frozen, so that no rank waits for a gradient
            that never comes.
        files: which arguments name a file or folder that this objective reads, and what that is.

    Raises:
        UserError: for a weight or schedule that makes no sense.
    """

    optional_parts: frozenset[str] = frozenset()
    files: ClassVar[Mapping[str, FileKind]] = {}

    @check_bounds
    def __init__(self, *, weight: NotNegative = 1.0, schedule: Schedule | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.schedule = None if schedule is None else check_schedule(schedule)

    def prepare(self, resources: Resources) -> None:
        """Load what `files` names; called once, before `build`.

        Raises:
            UserError: with the argument as its key, for a file that cannot be used.
        """

    def build(self, shape: M2EncoderConfig) -> None:
        """Make parameters that depend on the model; called once, before the optimizer is made."""

    def trained_parts(self) -> frozenset[str]:
        """Names of `PARTS` that get a gradient of this objective."""
        return self.optional_parts | {"features", "vision_expert_reader"}

    def weight_at(self, step: int) -> float:
        """The weight, times the schedule's factor before update `step` + 1."""
        return self.weight if self.schedule is None else self.weight * interpolate_schedule(self.schedule, step)

    @abstractmethod
    def forward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """Compute the loss of the local rows."""


Each = TypeVar("Each")


def active(objectives: Mapping[str, Each]) -> dict[str, Each]:
    """Those with a weight above 0; the others are no part of a run, whatever they say.

    Args:
        objectives: by name; objects, or the nodes of a configuration that describe them.
    """
    return {name: each for name, each in objectives.items() if _weight_of(each) > 0}


def _weight_of(objective: Any) -> float:
    return float(objective.get("weight", 1.0) if isinstance(objective, Mapping) else objective.weight)


class LocalTerms(NamedTuple):
    """What a local objective says of a piece, caption by caption."""

    sums: Tensor  # of the losses of all terms (such as tokens) of a caption, (k * b,), fp32 at least
    counts: Tensor  # how many terms it has, (k * b,); 0 is allowed
    scores: Mapping[str, Tensor] = {}  # more sums over the same terms, by name, (k * b,) each, detached


class LocalObjective(Objective):
    """A loss whose terms each belong to one pair: the mean over the terms of all ranks.

    Args:
        weight: factor in the sum of objectives.
        schedule: see `Objective`.
        text_expert: send texts through the text experts of the vision-language layers where image and text meet, as in
            BEiT-3; otherwise through its vision experts, which serve both modalities in the released features (whether
            its text experts were trained is not known). All local objectives of a run must agree.

    Attributes:
        passes: names of `PASSES` that `terms` asks for.
        score_names: names of the scores that `terms` gives, always all of them.
        word_ratio: share of a caption's tokens that it wants hidden; None for none.
        patch_ratio: share of an image's patches that it wants hidden; None for none.
        user_dictionary: file of more words for jieba; None for none.
    """

    passes: frozenset[str] = frozenset()
    score_names: tuple[str, ...] = ()
    word_ratio: float | None = None
    patch_ratio: float | None = None
    user_dictionary: str | None = None

    @check_bounds
    def __init__(
        self, *, weight: NotNegative = 1.0, schedule: Schedule | None = None, text_expert: bool = False
    ) -> None:
        super().__init__(weight=weight, schedule=schedule)
        self.text_expert = text_expert

    def trained_parts(self) -> frozenset[str]:
        """Names of `PARTS` that get a gradient of this objective."""
        parts = self.optional_parts | fused_parts(text_expert=self.text_expert, passes=self.passes)
        return parts | {"vision_expert_reader"} if "features" in parts else parts

    @abstractmethod
    def terms(self, passes: PiecePasses) -> LocalTerms:
        """Compute the terms of a piece; runs again in backward where micro-batches are recomputed."""

    def forward(self, inputs: PiecePasses) -> LocalTerms:  # type: ignore[override]  # the other kind of input
        """As `terms`."""
        return self.terms(inputs)


class PairObjective(Objective):
    """A loss of right and wrong pairs: the mean over the terms of all ranks.

    Uses features to select hard negatives, without a gradient to them.

    Args:
        weight: factor in the sum of objectives.
        schedule: see `Objective`.
        text_expert: see `LocalObjective`.

    Attributes:
        score_names: names of the scores that `terms` gives, always all of them.
    """

    score_names: tuple[str, ...] = ()

    @check_bounds
    def __init__(
        self, *, weight: NotNegative = 1.0, schedule: Schedule | None = None, text_expert: bool = False
    ) -> None:
        super().__init__(weight=weight, schedule=schedule)
        self.text_expert = text_expert

    def trained_parts(self) -> frozenset[str]:
        """Names of `PARTS` that get a gradient of this objective."""
        return self.optional_parts | fused_parts(text_expert=self.text_expert, passes=["caption"])

    @abstractmethod
    def select(self, inputs: ObjectiveInputs) -> HardPairs:
        """Select hard negatives, once per step; collective in the group, without gradients."""

    @abstractmethod
    def terms(self, passes: PiecePairs) -> LocalTerms:
        """Compute the terms of a piece; runs again in backward where micro-batches are recomputed."""

    def forward(self, inputs: PiecePairs) -> LocalTerms:  # type: ignore[override]  # another kind of input
        """As `terms`."""
        return self.terms(inputs)


def fused_parts(*, text_expert: bool, passes: Iterable[str]) -> frozenset[str]:
    """Names of `PARTS` that states of image and text together train.

    Args:
        text_expert: whether texts take the text experts there.
        passes: names of the `PASSES` whose states are used.
    """
    if not text_expert:
        return frozenset({"vision_expert_reader"})
    readers = {"vision_expert_reader" if name == "masked_image" else "text_expert_reader" for name in passes}
    return frozenset({"vl_text_expert"} | readers)
