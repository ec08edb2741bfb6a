"""What a format of `m2-export` is, and what it is made from.

Letters: n pictures · m texts · E feature dim · S side of a picture.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

import torch
from torch import Tensor

from m2_encoder.checkpoints.card_words import Words
from m2_encoder.checkpoints.peft_files import LoraAdapter
from m2_encoder.errors import Problem
from m2_encoder.evaluation.models.own import wrap_towers
from m2_encoder.exports.samples import TEXTS, make_pictures
from m2_encoder.hub import LoadedModel
from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

if TYPE_CHECKING:
    from m2_encoder.exports.recall import Recall

BOUND_FP32: Final = 0.99999
"""Cosine to our own features that every sample must reach, or the format is not written."""

BOUND_FP16: Final = 0.9999
"""The same for weights of 16 bits."""

BOUND_INT8_TABLE: Final = 0.999
"""The same for a token table of 8 bits; recall decides, too."""

BOUND_INT8: Final = 0.95
"""The same for matrices of 8 bits: it finds broken graphs, recall decides on the others."""

_BATCH: Final = 8  # pictures of a pass
_REPEATS: Final = 5


class Features(NamedTuple):
    """Of all samples, in their order."""

    images: Tensor  # (n, E) fp32
    texts: Tensor  # (m, E) fp32


class Measured(NamedTuple):
    """How an export compares with the model that it was made from."""

    largest_difference: float  # of a number of a feature
    smallest_cosine: float  # of a feature to ours
    image_ms: float | None = None  # median of one picture, batch of 1; None where nothing was timed
    text_ms: float | None = None  # the same of one text
    peak_bytes: int | None = None  # of the memory of a process that does only this
    notes: Sequence[Words] = ()  # what else was found
    recall: Recall | None = None  # where weights were rounded to 8 bits


@dataclasses.dataclass(frozen=True)
class ExportSource:
    """A model to be exported, with what is known about it.

    Attributes:
        loaded: the model in fp32 on the CPU, in evaluation mode; how it reads pictures and texts.
        card: its model card, Markdown.
        write_native: writes the folder that `load` reads, at a path where nothing is.
        adapter: what was trained apart from the base, for a format that needs it; the model is merged.
    """

    loaded: LoadedModel
    card: str
    write_native: Callable[[Path], object]
    adapter: LoraAdapter | None = None

    @property
    def model(self) -> M2Encoder:
        """In evaluation mode."""
        return self.loaded.model

    @property
    def tokenizer(self) -> SentencePieceTokenizer:
        """The one the model was trained with."""
        assert isinstance(self.loaded.tokenizer, SentencePieceTokenizer)
        return self.loaded.tokenizer

    @functools.cached_property
    def fingerprint(self) -> str:
        """That of the model in indexes and records."""
        loaded = self.loaded
        return wrap_towers(loaded.model, loaded.preprocess, self.tokenizer, name="").fingerprint

    @functools.cached_property
    def pixels(self) -> Tensor:
        """The sample pictures as the model wants them, (n, 3, S, S) fp32 in 0..1."""
        return torch.stack([self.loaded.preprocess(picture.content) for picture in make_pictures()])

    @functools.cached_property
    def image_features(self) -> Tensor:
        """Of the sample pictures, (n, E)."""
        with torch.inference_mode():
            return torch.cat([self.model.encode_image(batch) for batch in self.pixels.split(_BATCH)]).float()

    def text_features(self, texts: Sequence[str] = TEXTS, *, context_length: int | None = None, **how: str) -> Tensor:
        """Of texts, (m, E); options as of the tokenizer."""
        tokens = self.tokenizer(texts, context_length, **how)  # type: ignore[arg-type]
        with torch.inference_mode():
            return self.model.encode_text(tokens).float()

    def milliseconds(self) -> tuple[float, float]:
        """Medians of encoding one picture and one text with torch."""
        picture, texts = self.pixels[:1], [self.tokenizer(text) for text in TEXTS]
        with torch.inference_mode():
            image = median_ms([functools.partial(self.model.encode_image, picture)] * _REPEATS)
            return image, median_ms([functools.partial(self.model.encode_text, tokens) for tokens in texts])


class ExportFormat(ABC):
    """What a tool reads: a class per tool, an option of `conf/to/` for each.

    Its constructor takes the settings. `write` gets a folder of its own; what it leaves there is moved to the export
    if `measure` finds the features of the model in it.
    """

    bound: float = BOUND_FP32
    """Smallest cosine."""

    needs_adapter: ClassVar[bool] = False
    """Whether it is made of `ExportSource.adapter`."""

    def problems(self, config: M2EncoderConfig) -> Iterator[Problem]:
        """What keeps a model of this architecture from being written, before anything is read; keys as of the class."""
        yield from ()

    @abstractmethod
    def write(self, folder: Path, source: ExportSource) -> None:
        """Writes all files at a path where nothing is.

        Other formats of the same export may share work beside it, in `folder.parent`, which is removed at the end.
        """

    @abstractmethod
    def measure(self, folder: Path, source: ExportSource) -> Measured:
        """Reads what `write` has written, as the tool does, and compares features of the samples."""

    @abstractmethod
    def usage(self, source: ExportSource) -> str:
        """How to open it, in Chinese and English, for the model card: Markdown without a heading."""


def compare(ours: Features, theirs: Features) -> tuple[float, float]:
    """Largest difference and smallest cosine over rows; what is not finite has a cosine of -1."""
    differences, cosines = [], []
    for one, other in zip(ours, theirs, strict=True):
        one, other = one.double(), other.double()
        if not bool(other.isfinite().all()):
            return float("inf"), -1.0
        differences.append(float((one - other).abs().max()))
        cosines.append(float(torch.nn.functional.cosine_similarity(one, other).min()))
    return max(differences), min(cosines)


def median_ms(calls: Sequence[Callable[[], object]]) -> float:
    """Of the time that calls take, after one that is not counted."""
    calls[0]()
    times = []
    for call in calls:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1000 * sorted(times)[len(times) // 2]
