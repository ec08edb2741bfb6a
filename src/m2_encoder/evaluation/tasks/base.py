"""What an evaluation task is: a class that measures a model, named by one YAML file of the group `evaluation`."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from m2_encoder.checkpoints.matching_head import MatchingHead
from m2_encoder.data.masking.batch_masking import BatchMasking
from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.evaluation.encode import DEFAULT_BATCH_SIZE
from m2_encoder.evaluation.retrieval import SetFeatures, encode_set
from m2_encoder.evaluation.tables import ResultTable
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.visual_tokenizer import VisualTokenizer
from m2_encoder.objectives.base import Objective
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

_LAST_SPLITS = ("val", "val_style", "train")  # for choosing, not for reporting: they come below the others
_FIRST_LANGUAGE = "zh"  # on the left and above, where both are shown


class RunFacts(NamedTuple):
    """What pictures say of the run that trained a model."""

    name: str = ""  # of the run
    model: str = "model"  # name of the architecture
    steps: int | None = None  # that it was trained for; None if nobody knows
    heldout_style: str = ""  # drawing style of the embedded set that training did not show
    # tars of the sets by split, for pictures larger than the model's; None without such a folder
    folder: Path | None = None


@dataclasses.dataclass(frozen=True)
class EvaluationContext:
    """What tasks are given."""

    model: M2Encoder | VisualTokenizer  # on any device; a task leaves it in the mode in which it was
    tokenizer: SentencePieceTokenizer  # the model's own
    sets: Mapping[str, RetrievalSet]  # by split, images at the model's size; those for reporting come first
    # that trained the model, with their heads; empty for a model that was loaded
    objectives: Mapping[str, Objective] = dataclasses.field(default_factory=dict)
    masking: BatchMasking | None = None  # what these hide; None if nothing
    matching: MatchingHead | None = None  # head of image-text matching; None without one
    batch_size: int = DEFAULT_BATCH_SIZE  # images or texts per forward pass
    run: RunFacts = dataclasses.field(default_factory=RunFacts)  # what pictures say of the run

    def __post_init__(self) -> None:
        ordered = sorted(self.sets, key=lambda split: split in _LAST_SPLITS)
        object.__setattr__(self, "sets", {split: self.sets[split] for split in ordered})

    @property
    def encoder(self) -> M2Encoder:
        """The model of a task for encoders."""
        assert isinstance(self.model, M2Encoder), "EvaluationTask.applies leaves out other models"
        return self.model

    @cached_property
    def features(self) -> dict[str, SetFeatures]:
        """All sets, encoded once for all tasks."""
        encoded = {}
        for split, dataset in self.sets.items():
            languages = sorted(dataset.captions, key=lambda language: language != _FIRST_LANGUAGE)
            encoded[split] = encode_set(
                self.encoder, dataset, self.tokenizer, languages=languages, batch_size=self.batch_size
            )
        return encoded

    def metric(self, split: str, language: str, name: str) -> str:
        """Name of a metric, as loggers have it: `val/<set>_<language>/<name>`."""
        return f"val/{self.sets[split].name}_{language}/{name}"


class TaskResult(NamedTuple):
    """What a task found."""

    metrics: Mapping[str, float]  # by the names of the loggers
    rows: Sequence[ResultTable | str] = ()  # tables and lines to print
    record: Mapping[str, Any] = {}  # more entries of `summary.json`, by key
    markdown: str = ""  # its part of `results.md`
    # by file name, what draws them; nothing is drawn where there is no folder for it
    pictures: Mapping[str, Callable[[Path], object]] = {}


class EvaluationTask(ABC):
    """One thing to measure. Its arguments are those of its YAML file."""

    def applies(self, context: EvaluationContext) -> bool:
        """Whether there is anything to measure; other tasks are left out without a word. Here: encoders."""
        return isinstance(context.model, M2Encoder)

    @abstractmethod
    def measure(self, context: EvaluationContext) -> TaskResult:
        """Measures a model that the task applies to."""
