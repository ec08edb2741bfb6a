"""Distributions of a source's captions, images and duplicates, for `m2-data stats` and its figure."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from m2_encoder.data.inspect.duplicates import class_sizes
from m2_encoder.data.inspect.survey import Survey
from m2_encoder.types import LANGUAGES

LENGTH_UNITS = ("characters", "words", "tokens")
"""Units that lengths of captions are counted in."""

REPETITION_CLASSES = ("1", "2", "3-5", "6-10", "11-100", "101+")
"""How often the same caption or image occurs."""

_CLASS_ENDS = (1, 2, 5, 10, 100)
_MAX_POINTS = 4000  # of the scatter of sizes; more only cover each other


class Histogram(NamedTuple):
    """How many captions have each length."""

    lengths: tuple[int, ...]  # those that occur, ascending
    counts: tuple[int, ...]  # captions of each

    def share_above(self, limit: int) -> float:
        """Share of captions that are longer."""
        longer = sum(count for length, count in zip(self.lengths, self.counts, strict=True) if length > limit)
        return longer / max(1, sum(self.counts))


class Statistics(NamedTuple):
    """Distributions of the usable samples that were read.

    Attributes:
        lengths: by unit and language; units that were not counted are missing.
        caption_counts: number by language.
        sample_languages: samples by the languages of their captions, such as "en" or "en+zh".
        captions_per_sample: how many samples have each number of captions.
        sizes: width and height of images, evenly drawn, (k, 2).
        repeated: for "captions" and "images", the share of things whose class of `REPETITION_CLASSES` is each.
    """

    lengths: dict[str, dict[str, Histogram]]
    caption_counts: dict[str, int]
    sample_languages: dict[str, int]
    captions_per_sample: dict[int, int]
    sizes: npt.NDArray[np.int64]
    repeated: dict[str, tuple[float, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for JSON; without the sizes, which are for the picture."""
        lengths = {
            unit: {language: histogram._asdict() for language, histogram in by_language.items()}
            for unit, by_language in self.lengths.items()
        }
        repeated = {name: dict(zip(REPETITION_CLASSES, shares, strict=True)) for name, shares in self.repeated.items()}
        plain = {key: value for key, value in self._asdict().items() if key != "sizes"}
        return plain | {"lengths": lengths, "repeated": repeated}


def measure_statistics(survey: Survey) -> Statistics:
    """Distributions of everything a survey read."""
    captions, rows = survey.captions, survey.rows
    by_language = {
        language: captions[captions["language"] == number]
        for number, language in enumerate(LANGUAGES)
        if (captions["language"] == number).any()
    }
    lengths = {
        unit: {language: _histogram(own[unit]) for language, own in by_language.items()}
        for unit in LENGTH_UNITS
        if len(captions) and captions[unit][0] >= 0
    }
    per_sample, samples = np.unique(np.bincount(captions["row"], minlength=len(rows)), return_counts=True)
    step = max(1, -(-len(rows) // _MAX_POINTS))
    return Statistics(
        lengths=lengths,
        caption_counts={language: len(own) for language, own in by_language.items()},
        sample_languages=_sample_languages(captions, len(rows)),
        captions_per_sample=dict(zip(per_sample.tolist(), samples.tolist(), strict=True)),
        sizes=np.stack([rows["width"], rows["height"]], axis=1)[::step].astype(np.int64),
        repeated={"captions": _classes(captions["text"]), "images": _classes(rows["image"])},
    )


def _histogram(values: npt.NDArray[np.int32]) -> Histogram:
    lengths, counts = np.unique(values, return_counts=True)
    return Histogram(tuple(lengths.tolist()), tuple(counts.tolist()))


def _sample_languages(captions: npt.NDArray[np.void], num_samples: int) -> dict[str, int]:
    spoken = np.zeros(num_samples, np.int64)
    for number in range(len(LANGUAGES)):
        spoken[captions["row"][captions["language"] == number]] |= 1 << number
    masks, counts = np.unique(spoken, return_counts=True)
    names = ["+".join(name for bit, name in enumerate(LANGUAGES) if mask >> bit & 1) for mask in masks.tolist()]
    return dict(zip(names, counts.tolist(), strict=True))


def _classes(keys: npt.NDArray[np.uint64]) -> tuple[float, ...]:
    """Share of things in each class: a text that occurs three times counts three times."""
    sizes = class_sizes(keys)
    totals = np.bincount(np.searchsorted(_CLASS_ENDS, sizes), sizes, minlength=len(REPETITION_CLASSES))
    return tuple((totals / max(1, len(keys))).tolist())
