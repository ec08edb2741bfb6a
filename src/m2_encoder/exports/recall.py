"""Whether graphs of 8 bits still find what the model finds: retrieval on built-in drawings, both ways, in zh and en.

Cosines of rounded features are close to 1 and say little about the order of results, which is what people see.

Letters: n pictures · E feature dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from m2_encoder.data.emoji.dataset import EmojiConcept, EmojiStyle, load_emoji_concepts, load_emoji_images
from m2_encoder.evaluation.metrics import RECALL_KS, chance_recall, retrieval_metrics
from m2_encoder.exports.base import ExportSource, Features

NUM_PICTURES: Final = 512
STYLE: Final[EmojiStyle] = "twemoji"
"""The drawings that the built-in set keeps from training unless told otherwise."""

MOST_LOST: Final = 1.0
"""Percentage points that mean recall may fall."""

TIMES_CHANCE: Final = 10
"""How often the recall of guessing the model itself must reach, or its recall says nothing."""

COSINE_ALONE: Final = 0.999
"""Cosine that decides where recall says nothing."""

_LANGUAGES: Final = ("zh", "en")
_BATCH: Final = 8


class Recall(NamedTuple):
    """Recall of a model, and of graphs made from it; percent, the mean of R@1, 5 and 10."""

    ours: Mapping[str, float]  # by language and direction, such as "zh t2i"
    theirs: Mapping[str, float]
    chance: float  # of guessing

    @property
    def ours_mean(self) -> float:
        """Of the model, over languages and directions."""
        return sum(self.ours.values()) / len(self.ours)

    @property
    def theirs_mean(self) -> float:
        """Of the graphs."""
        return sum(self.theirs.values()) / len(self.theirs)

    @property
    def lost(self) -> float:
        """Points by which the mean falls."""
        return self.ours_mean - self.theirs_mean

    @property
    def decides(self) -> bool:
        """Whether the model finds enough for a fall to be seen."""
        return self.ours_mean >= TIMES_CHANCE * self.chance

    def rule(self, cosine: float) -> str:
        """What it says against the graphs, whose smallest cosine is given; empty if nothing."""
        if self.decides:
            fall = f"mean recall falls from {self.ours_mean:.1f} to {self.theirs_mean:.1f} %"
            return f"{fall}, {MOST_LOST} points are the most" if self.lost > MOST_LOST else ""
        if cosine >= COSINE_ALONE:
            return ""
        return f"{self.silence}; the smallest cosine is {cosine:.5f}, {COSINE_ALONE} is the least then"

    @property
    def silence(self) -> str:
        """Why recall decides nothing."""
        return (
            f"recall says nothing: the model itself finds {self.ours_mean:.1f} % of the built-in drawings, "
            f"guessing {self.chance:.1f} %"
        )


@functools.cache
def recall_concepts() -> tuple[EmojiConcept, ...]:
    """What the pictures show: concepts of the reported splits, evenly spaced."""
    known = [each for each in load_emoji_concepts() if each.split != "val" and STYLE in each.styles]
    return tuple(known[number * len(known) // NUM_PICTURES] for number in range(NUM_PICTURES))


def measure_recall(
    source: ExportSource, encode: Callable[[Tensor, Sequence[str]], Features], *, context_length: int | None = None
) -> Recall:
    """Recall of the model and of what `encode` runs, on the same pictures and names.

    Args:
        source: the model.
        encode: features of pictures, (n, 3, S, S), and of texts.
        context_length: most tokens of a text, of both; None: the model's own.
    """
    drawings = load_emoji_images(STYLE)
    pixels = torch.stack([source.loaded.preprocess(drawings[each.key]) for each in recall_concepts()])
    texts = [each.captions[language].name for language in _LANGUAGES for each in recall_concepts()]
    with torch.inference_mode():
        images = torch.cat([source.model.encode_image(batch).float() for batch in pixels.split(_BATCH)])
    parts = [texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH)]
    names = torch.cat([source.text_features(part, context_length=context_length) for part in parts])
    return compare_recall(Features(images, names), encode(pixels, texts))


def compare_recall(ours: Features, theirs: Features) -> Recall:
    """Recall of features of `recall_concepts`, (n, E), and of their names, (languages times n, E)."""
    chance = sum(chance_recall(NUM_PICTURES, k) for k in RECALL_KS) / len(RECALL_KS)
    return Recall(_recall(ours), _recall(theirs), chance)


def _recall(features: Features) -> dict[str, float]:
    rows, found = torch.arange(NUM_PICTURES), {}
    for language, texts in zip(_LANGUAGES, features.texts.split(NUM_PICTURES), strict=True):
        metrics = retrieval_metrics(features.images, rows, texts, rows)
        for way in ("t2i", "i2t"):
            found[f"{language} {way}"] = sum(metrics[f"{way}_r@{k}"] for k in RECALL_KS) / len(RECALL_KS)
    return found
