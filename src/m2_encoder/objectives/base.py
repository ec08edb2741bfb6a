"""Objectives: the losses of one optimizer step, each with a weight.

- An `Objective` compares the features of all rows of a contrastive group.
- A `LocalObjective` predicts tokens or patches from hidden states of single pairs. It runs on one piece (micro-batch)
  at a time and returns a sum and a count per caption, so that the mean over all ranks is exact.
- A `PairObjective` also returns sums and counts, for pairs with hard negatives. It selects these by features.

To add one, subclass one of the three in a file of this folder and name the class in a YAML file in `conf/objective/`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from m2_encoder.bounds import NotNegative, check_bounds
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.objectives.files import FileKind, Resources
from m2_encoder.objectives.passes import HardPairs, PiecePairs, PiecePasses
from m2_encoder.objectives.schedule import Schedule, check_schedule, interpolate_schedule
from m2_encoder.types import ImageTextBatch

if TYPE_CHECKING:
    from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

Each = TypeVar("Each")


class FeaturePair(NamedTuple):
    """Features of one head of the model, and their temperature."""

    image_features: Tensor  # (B, E), L2-normalised
    text_features: Tensor  # (k * B, E), L2-normalised; k captions per image, row j describes image j // k
    logit_scale: Tensor  # log of the inverse temperature, ()


class ObjectiveInputs(NamedTuple):
    """Input of an objective: the features of this rank, and the ranks to compare them with."""

    heads: Mapping[str, FeaturePair]  # "features", and "backbone_features" if an objective trains that head
    identity: Tensor  # equal numbers mark the same content, (B,) int64
    group: dist.ProcessGroup | None  # ranks whose rows serve as negatives; None for this rank alone
    batch: ImageTextBatch | None = None  # the rows that were encoded; None if features come from elsewhere
    step: int = 0  # updates done so far

    @property
    def image_features(self) -> Tensor:
        """Of the vision-language head, (B, E), L2-normalised."""
        return self.heads["features"].image_features

    @property
    def text_features(self) -> Tensor:
        """Of the vision-language head, (k * B, E), L2-normalised; row j describes image j // k."""
        return self.heads["features"].text_features

    @property
    def logit_scale(self) -> Tensor:
        """Log of the inverse temperature, ()."""
        return self.heads["features"].logit_scale


class ObjectiveOutput(NamedTuple):
    """A loss, and what is logged of it."""

    loss: Tensor  # of the local rows, (), fp32, unweighted; its mean over the ranks is the loss of the step
    per_sample: Tensor  # loss of each local caption, (k * B,) fp32, detached; logged per language
    counts: Tensor | None = None  # number of terms that each of `per_sample` is the mean of, (k * B,); None: 1 each
    scores: Mapping[str, Tensor] = {}  # means over the same terms, such as an accuracy, (k * B,) each, detached


class Objective(nn.Module, ABC):
    """A loss of one optimizer step.

    Args:
        weight: factor in the sum of objectives. An objective of weight 0 is left out of the run.
        schedule: factor of the weight by step, [[step, factor], ...], linear in between and constant beyond; None for
            1 always. The objective costs nothing in steps where it is 0. Step s follows s updates.

    Attributes:
        optional_parts: names of `m2_encoder.models.trainable_parts.PARTS` that this objective trains beyond those that
            all of its kind train. Parts that no objective of a run trains are frozen: DDP hangs if a trainable
            parameter gets no gradient.
        files: kinds of the files or folders that arguments name, by argument.
        readers: further tokenizers by which the captions are read, known after `prepare`: what each makes of a batch
            is in its `extra` under the same name, (k * B, 2, T), ids and mask.
    """

    optional_parts: frozenset[str] = frozenset()
    files: ClassVar[Mapping[str, FileKind]] = {}

    @check_bounds
    def __init__(self, *, weight: NotNegative = 1.0, schedule: Schedule | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.schedule = None if schedule is None else check_schedule(schedule)
        self.readers: dict[str, SentencePieceTokenizer] = {}

    def prepare(self, resources: Resources) -> None:
        """Load the files that `files` declares; called once, before `build`.

        Raises:
            UserError: with the argument as its key, for a file that cannot be used.
        """

    def build(self, shape: M2EncoderConfig) -> None:
        """Make parameters whose shapes depend on the model; called once, before the optimizer is made."""

    def trained_parts(self) -> frozenset[str]:
        """Names of `PARTS` that get a gradient of this objective."""
        return self.optional_parts | {"features", "vision_expert_reader"}

    def weight_at(self, step: int) -> float:
        """Weight times schedule, after `step` updates."""
        return self.weight if self.schedule is None else self.weight * interpolate_schedule(self.schedule, step)

    @abstractmethod
    def forward(self, inputs: ObjectiveInputs) -> ObjectiveOutput:
        """Compute the loss of the local rows."""


def active(objectives: Mapping[str, Each]) -> dict[str, Each]:
    """Those of weight above 0: objects, or the configurations they are made from."""
    return {name: each for name, each in objectives.items() if _weight_of(each) > 0}


def _weight_of(objective: Any) -> float:
    return float(objective.get("weight", 1.0) if isinstance(objective, Mapping) else objective.weight)


class LocalTerms(NamedTuple):
    """Losses of a piece, summed by caption; a term is one prediction, such as that of a token."""

    sums: Tensor  # sum of the losses of a caption's terms, (k * b,), fp32 at least
    counts: Tensor  # number of its terms, (k * b,); 0 is allowed
    scores: Mapping[str, Tensor] = {}  # sums of other values of these terms, (k * b,) each, detached


class TermObjective(Objective):
    """A loss that is the mean over the terms of all ranks; base of `LocalObjective` and `PairObjective`.

    Args:
        weight: see `Objective`.
        schedule: see `Objective`.
        text_expert: where image and text meet, send texts through the text experts of the vision-language layers, as in
            BEiT-3. Otherwise they go through the vision experts, which serve both modalities in the released features
            (whether the released text experts were trained is not known).

    Attributes:
        score_names: names of the scores that `terms` returns, in every call.
    """

    score_names: tuple[str, ...] = ()

    @check_bounds
    def __init__(
        self, *, weight: NotNegative = 1.0, schedule: Schedule | None = None, text_expert: bool = False
    ) -> None:
        super().__init__(weight=weight, schedule=schedule)
        self.text_expert = text_expert

    @abstractmethod
    def terms(self, passes: Any) -> LocalTerms:
        """Compute the terms of a piece; runs again in backward where micro-batches are recomputed."""

    def forward(self, inputs: Any) -> LocalTerms:  # type: ignore[override]  # another kind of input and output
        """As `terms`."""
        return self.terms(inputs)


class LocalObjective(TermObjective):
    """A loss whose terms each belong to one pair. All local objectives of a run must agree on `text_expert`.

    Attributes:
        passes: passes of `PiecePasses` that `terms` uses, of "masked_text", "masked_image" and "caption".
        word_ratio: share of a caption's tokens that the data module hides; None for none.
        patch_ratio: share of an image's patches that the data module hides; None for none.
        user_dictionary: file of more words for jieba, by which whole words are hidden; None for none.
    """

    passes: frozenset[str] = frozenset()
    word_ratio: float | None = None
    patch_ratio: float | None = None
    user_dictionary: str | None = None

    def trained_parts(self) -> frozenset[str]:
        """Names of `PARTS` that get a gradient of this objective."""
        parts = self.optional_parts | _fused_parts(text_expert=self.text_expert, passes=self.passes)
        return parts | {"vision_expert_reader"} if "features" in parts else parts

    @abstractmethod
    def terms(self, passes: PiecePasses) -> LocalTerms:
        """Compute the terms of a piece; runs again in backward where micro-batches are recomputed."""


class PairObjective(TermObjective):
    """A loss of right and wrong pairs. Uses features to select hard negatives, without a gradient to them."""

    def trained_parts(self) -> frozenset[str]:
        """Names of `PARTS` that get a gradient of this objective."""
        return self.optional_parts | _fused_parts(text_expert=self.text_expert, passes=["caption"])

    @abstractmethod
    def select(self, inputs: ObjectiveInputs) -> HardPairs:
        """Select hard negatives, once per step; collective in the group, without gradients."""

    @abstractmethod
    def terms(self, passes: PiecePairs) -> LocalTerms:
        """Compute the terms of a piece; runs again in backward where micro-batches are recomputed."""


def _fused_parts(*, text_expert: bool, passes: Iterable[str]) -> frozenset[str]:
    """Names of `PARTS` that get a gradient from the states of these passes of image and text together."""
    if not text_expert:
        return frozenset({"vision_expert_reader"})
    readers = {"vision_expert_reader" if name == "masked_image" else "text_expert_reader" for name in passes}
    return frozenset({"vl_text_expert"} | readers)
