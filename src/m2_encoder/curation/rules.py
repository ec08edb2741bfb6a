"""The rules that look at one pair at a time: pure functions from an Arrow batch to the batch with decision columns.

Each rule adds the values it looks at, and rejects rows: it sets `keep` to false and `reason` to its name, unless an
earlier rule rejected the row already. Rules that compare rows with each other are in
`m2_encoder.curation.global_rules`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from m2_encoder.curation.evaluation_images import EvaluationImages
from m2_encoder.curation.near import is_near_any
from m2_encoder.curation.settings import CurationSettings, LengthLimit
from m2_encoder.curation.text_columns import (
    UNKNOWN,
    count_characters,
    count_words,
    detect_language,
    hash_captions,
)
from m2_encoder.types import LANGUAGES

Rule = Callable[[pa.RecordBatch], pa.RecordBatch]

TOO_SHORT: Final = "too_short"
TOO_LONG: Final = "too_long"
OTHER_LANGUAGE: Final = "other_language"
WRONG_LANGUAGE: Final = "wrong_language"
ABSURD_SHAPE: Final = "absurd_shape"
TOO_SMALL: Final = "too_small"
EVALUATION_IMAGE: Final = "evaluation_image"
LOW_SCORE: Final = "low_score"
UNDECODABLE_IMAGE: Final = "undecodable_image"


def build_rules(settings: CurationSettings, evaluation: EvaluationImages | None) -> list[Rule]:
    """The rules that settings ask for, in the order in which they give reasons."""
    rules: list[Rule] = [
        reject_faults,
        functools.partial(
            check_language,
            allowed=settings.languages,
            detector=settings.detector,
            min_confidence=settings.min_confidence,
            mismatch=settings.mismatch,
        ),
        functools.partial(check_lengths, limits=settings.lengths, exempt_roles=settings.exempt_roles),
        functools.partial(check_shape, max_aspect_ratio=settings.max_aspect_ratio, min_side_px=settings.min_side_px),
        functools.partial(add_caption_hash, form=settings.caption_form),
    ]
    if evaluation is not None:
        near = functools.partial(
            check_evaluation, images=evaluation, distance=settings.evaluation_near, tolerance=settings.near_color
        )
        rules.append(near)
    return rules


def apply_rules(batch: pa.RecordBatch, rules: list[Rule]) -> pa.RecordBatch:
    """Apply rules one after the other."""
    return functools.reduce(lambda current, rule: rule(current), rules, batch)


def reject_faults(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Start the decision: a pair that could not be read is rejected with its fault as the reason."""
    fault = batch.column("fault")
    return _add(batch, keep=pc.is_null(fault), reason=fault)


def check_language(
    batch: pa.RecordBatch, *, allowed: tuple[str, ...] | None, detector: str, min_confidence: float, mismatch: str
) -> pa.RecordBatch:
    """Add `detected`, `confidence` and `language`; reject what is in other languages, which training leaves out.

    `mismatch="keep"` files a caption under its declared language, "drop" rejects it, "relabel" files it under the
    detected one if that is in `m2_encoder.types.LANGUAGES`. Captions without letters pass.
    """
    detected, confidence = detect_language(batch.column("text"), detector=detector, min_confidence=min_confidence)
    declared = batch.column("declared")
    has_letters = pc.not_equal(detected, UNKNOWN)
    read = pc.if_else(has_letters, detected, pa.scalar(LANGUAGES[0]))
    language = pc.coalesce(declared, pc.if_else(pc.is_valid(batch.column("text")), read, None))
    differs = pc.and_(has_letters, pc.fill_null(pc.not_equal(declared, detected), False))
    if mismatch == "relabel":
        is_known = pc.is_in(detected, value_set=pa.array(LANGUAGES))
        language = pc.if_else(pc.and_(differs, is_known), detected, language)
    batch = _add(batch, detected=detected, confidence=confidence, language=language)
    batch = reject(batch, pc.invert(pc.is_in(language, value_set=pa.array([*LANGUAGES, None]))), OTHER_LANGUAGE)
    if allowed is not None:
        known = pa.array([*allowed, UNKNOWN])
        filed = detected if mismatch == "relabel" else pc.coalesce(declared, detected)
        for said in (detected, filed):
            batch = reject(batch, pc.invert(pc.is_in(said, value_set=known)), OTHER_LANGUAGE)
    return reject(batch, differs, WRONG_LANGUAGE) if mismatch == "drop" else batch


def check_lengths(
    batch: pa.RecordBatch, *, limits: Mapping[str, LengthLimit], exempt_roles: tuple[str, ...]
) -> pa.RecordBatch:
    """Add `characters` and `words`; reject captions outside the limits of their language.

    Reference: M2-Encoder (arXiv:2401.15896), texts shorter than 5 characters; the limits per language are ours.
    """
    text, language = batch.column("text"), batch.column("language")
    counts = {"characters": count_characters(text), "words": count_words(text)}
    batch = _add(batch, **counts)
    applies = pc.invert(pc.is_in(batch.column("role"), value_set=pa.array(exempt_roles, pa.string())))
    for name, limit in limits.items():
        here = pc.and_(applies, pc.fill_null(pc.equal(language, name), False))
        length = pc.fill_null(counts[limit.unit], 0)
        if limit.least is not None:
            batch = reject(batch, pc.and_(here, pc.less(length, limit.least)), TOO_SHORT)
        if limit.most is not None:
            batch = reject(batch, pc.and_(here, pc.greater(length, limit.most)), TOO_LONG)
    return batch


def check_shape(batch: pa.RecordBatch, *, max_aspect_ratio: float | None, min_side_px: int | None) -> pa.RecordBatch:
    """Add `aspect_ratio` and `min_side`; reject long and small images.

    Both limits are inclusive; the ratio is longer side over shorter side.

    Reference: M2-Encoder (arXiv:2401.15896), aspect ratio above 3; DataComp (arXiv:2304.14108), side below 200.
    """
    width, height = batch.column("width"), batch.column("height")
    shorter, longer = pc.min_element_wise(width, height), pc.max_element_wise(width, height)
    known = pc.if_else(pc.greater(shorter, 0), shorter, None)
    ratio = pc.divide(pc.cast(longer, pa.float32()), pc.cast(known, pa.float32()))
    batch = _add(batch, aspect_ratio=ratio, min_side=shorter)
    if max_aspect_ratio is not None:
        batch = reject(batch, pc.greater(pc.cast(ratio, pa.float64()), max_aspect_ratio), ABSURD_SHAPE)
    return batch if min_side_px is None else reject(batch, pc.less(shorter, min_side_px), TOO_SMALL)


def add_caption_hash(batch: pa.RecordBatch, *, form: str) -> pa.RecordBatch:
    """Add `caption_hash`, which equal captions share; rejects nothing."""
    return _add(batch, caption_hash=hash_captions(batch.column("text"), form=form))


def check_evaluation(
    batch: pa.RecordBatch, *, images: EvaluationImages, distance: int | None, tolerance: int
) -> pa.RecordBatch:
    """Add `evaluation`; reject images that are evaluation images, or look like one.

    `distance` counts bits of the perceptual hash (None compares bytes only); `tolerance` is per channel of the mean
    colour.
    """
    found = pc.is_in(batch.column("image_hash"), value_set=images.hashes)
    if distance is not None and len(images.perceptual):
        hashes, colors = batch.column("perceptual_hash"), batch.column("mean_color")
        rows = np.flatnonzero(pc.is_valid(hashes).to_numpy(zero_copy_only=False))
        near = np.zeros(len(hashes), dtype=bool)
        near[rows] = is_near_any(
            hashes.take(pa.array(rows)).to_numpy(zero_copy_only=False).astype(np.uint64),
            colors.take(pa.array(rows)).to_numpy(zero_copy_only=False).astype(np.uint64),
            images.perceptual,
            images.colors,
            distance=distance,
            tolerance=tolerance,
        )
        found = pc.or_(found, pa.array(near))
    return reject(_add(batch, evaluation=found), found, EVALUATION_IMAGE)


def check_score(batch: pa.RecordBatch, *, drop_below: float | None, rewrite_below: float | None) -> pa.RecordBatch:
    """Add `rewrite`, the flag of captions that a captioner should write anew; reject those with a lower score.

    Reference: M2-Encoder (arXiv:2401.15896), captions with a CLIP score below 0.25 are rewritten.
    """
    score = pc.cast(batch.column("score"), pa.float64())
    batch = reject(batch, pc.is_null(score), UNDECODABLE_IMAGE)
    if drop_below is not None:
        batch = reject(batch, pc.less(score, drop_below), LOW_SCORE)
    below = pc.less(score, rewrite_below) if rewrite_below is not None else pa.array([False] * len(score))
    return _add(batch, rewrite=pc.and_(batch.column("keep"), pc.fill_null(below, False)))


def reject(batch: pa.RecordBatch, failed: Any, reason: str) -> pa.RecordBatch:
    """Reject the rows of the mask `failed` (null is false); rows rejected before keep their reason."""
    newly = pc.and_(batch.column("keep"), pc.fill_null(failed, False))
    keep = pc.and_(batch.column("keep"), pc.invert(newly))
    return _add(batch, keep=keep, reason=pc.if_else(newly, reason, batch.column("reason")))


def _add(batch: pa.RecordBatch, **columns: Any) -> pa.RecordBatch:
    """The batch with columns added or, where they exist, replaced."""
    values = dict(zip(batch.schema.names, batch.columns, strict=True)) | columns
    return pa.record_batch(values)
