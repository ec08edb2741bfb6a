"""Base class of evaluation tasks; each is one YAML file of the group `evaluation`."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import nn

from m2_encoder.checkpoints.matching_head import MatchingHead
from m2_encoder.data.masking.batch_masking import BatchMasking
from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.evaluation.encode import DEFAULT_BATCH_SIZE, FeatureModel
from m2_encoder.evaluation.features import FeatureEncoder
from m2_encoder.evaluation.records import Record
from m2_encoder.evaluation.report.page import Gallery
from m2_encoder.evaluation.retrieval import SetFeatures, encode_set
from m2_encoder.evaluation.tables import CellTable, ResultTable, split_title
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.visual_tokenizer import VisualTokenizer
from m2_encoder.objectives.base import Objective

_LAST_SPLITS = ("val", "val_style", "train")  # of the built-in set, not for reporting, so they come last


class RunFacts(NamedTuple):
    """What pictures say of the run that trained a model."""

    name: str = ""
    model: str = "model"  # name of the architecture
    steps: int | None = None  # that it was trained for; None if unknown
    heldout_style: str = ""  # drawing style of the built-in set that training left out
    folder: Path | None = None  # tars of the sets by split, for pictures larger than the model's


@dataclasses.dataclass(frozen=True)
class EvaluationContext:
    """The model, the sets and what else tasks use."""

    # An encoder, a visual tokenizer, or what else has encode_image and encode_text; on any device, tasks restore its
    # training mode.
    model: nn.Module
    tokenizer: Any  # the model's own: a `SentencePieceTokenizer`, but with somebody else's model what came with it
    sets: Mapping[str, RetrievalSet]  # by name in tables, such as a split; images at the model's size
    # of the run, with their heads; empty for a loaded model
    objectives: Mapping[str, Objective] = dataclasses.field(default_factory=dict)
    masking: BatchMasking | None = None  # hides words and patches; None if nothing is hidden
    matching: MatchingHead | None = None  # head of image-text matching
    batch_size: int = DEFAULT_BATCH_SIZE  # images or texts per forward pass
    run: RunFacts = dataclasses.field(default_factory=RunFacts)
    files: FeatureEncoder | None = None  # the model for sets that are read from disk; None if it cannot encode these
    # Loads the model that the run started from, on the CPU; None if it started from random weights, or is not known.
    start: Callable[[], M2Encoder] | None = None

    def __post_init__(self) -> None:
        ordered = sorted(self.sets, key=lambda name: self.sets[name].split in _LAST_SPLITS)
        object.__setattr__(self, "sets", {split: self.sets[split] for split in ordered})

    @property
    def encoder(self) -> M2Encoder:
        """The model, of a task that needs more than features."""
        assert isinstance(self.model, M2Encoder), "EvaluationTask.applies leaves out other models"
        return self.model

    @property
    def feature_model(self) -> FeatureModel:
        """The model, of a task that needs features alone."""
        return cast("FeatureModel", self.model)

    @cached_property
    def features(self) -> dict[str, SetFeatures]:
        """Features of all sets, computed once for all tasks."""
        return {
            split: encode_set(self.feature_model, dataset, self.tokenizer, batch_size=self.batch_size)
            for split, dataset in self.sets.items()
        }

    @property
    def titles(self) -> dict[str, str]:
        """Titles of the sets in tables and pictures: what they are, whatever their folders are called."""
        return {name: split_title(name, dataset.split) for name, dataset in self.sets.items()}

    def metric(self, split: str, language: str, name: str) -> str:
        """Name of a metric for loggers: `val/<set>_<language>/<name>`."""
        return f"val/{self.sets[split].name}_{language}/{name}"


class TaskResult(NamedTuple):
    """Results of a task."""

    metrics: Mapping[str, float]  # by name for loggers
    rows: Sequence[ResultTable | CellTable | str] = ()  # tables and lines to print
    record: Mapping[str, Any] = {}  # more entries of `summary.json`, by key
    markdown: str = ""  # part of `results.md`
    pictures: Mapping[str, Callable[[Path], object]] = {}  # functions that draw them, by file name
    records: Sequence[Record] = ()  # one per number, for reports
    galleries: Sequence[Gallery] = ()  # for reports
    left_out: Mapping[str, Sequence[str]] = {}  # pictures that could not be used and why, by set


class EvaluationTask(ABC):
    """Measures one thing. Its constructor takes the arguments of its YAML file."""

    def prepare(self, find: Callable[[str], Path] = Path) -> None:  # noqa: B027 (most tasks need nothing)
        """Looks at what it measures on, before a model is there; `find` gives the place of a path.

        Raises:
            UserError: for what is missing.
        """

    def applies(self, context: EvaluationContext) -> bool:
        """Whether there is anything to measure; here: models with features. Other tasks are left out silently."""
        return not isinstance(context.model, VisualTokenizer)

    @abstractmethod
    def measure(self, context: EvaluationContext) -> TaskResult:
        """Measures a model that the task applies to."""
