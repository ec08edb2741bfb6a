"""What must hold of the rules for single pairs whatever the pairs are: a row's fate is a function of that row alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from m2_encoder.curation.evaluation_images import EvaluationImages
from m2_encoder.curation.rules import apply_rules, build_rules, check_score
from m2_encoder.curation.settings import CurationSettings, LengthLimit
from m2_encoder.curation.tables import MEASURED
from m2_encoder.types import LANGUAGES

_FEW_HASHES = [bytes([number]) * 32 for number in range(3)]
EVALUATION = EvaluationImages(
    pa.array(_FEW_HASHES[:1], pa.binary(32)),
    np.array([0b1111], dtype=np.uint64),
    np.array([0x808080], dtype=np.uint64),
)
TEXTS = st.one_of(
    st.sampled_from(["a red bus", "一只红色的猫", "ねこがいます", "красный автобус", "12 34", "Bus 巴士", "a", "猫"]),
    st.text(max_size=12).map(lambda text: text.encode("utf-8", "ignore").decode()),
)


@st.composite
def measured_rows(draw: st.DrawFn) -> dict[str, Any]:
    fault = draw(st.sampled_from([None, None, None, "bad_json", "undecodable_image"]))
    has_image, has_text = fault != "undecodable_image", fault != "bad_json"
    return {
        "sample": 0,
        "key": "k",
        "fault": fault,
        "text": draw(TEXTS) if has_text else None,
        "declared": draw(st.sampled_from([None, *LANGUAGES])) if has_text else None,
        "role": draw(st.sampled_from([None, "keyword"])) if has_text else None,
        "width": draw(st.integers(1, 2000)) if has_image else None,
        "height": draw(st.integers(1, 2000)) if has_image else None,
        "image_hash": draw(st.sampled_from(_FEW_HASHES)) if has_image else None,
        "perceptual_hash": draw(st.sampled_from([None, 0b0111, 0b1111, 2**64 - 1])) if has_image else None,
        "mean_color": draw(st.sampled_from([0x808080, 0xFF0000])) if has_image else None,
    }


@st.composite
def any_settings(draw: st.DrawFn) -> CurationSettings:
    least = st.one_of(st.none(), st.integers(0, 8))
    return CurationSettings(
        lengths={"zh": LengthLimit(least=draw(least)), "en": LengthLimit(least=draw(least), unit="words", most=9)},
        exempt_roles=draw(st.sampled_from([(), ("keyword",)])),
        max_aspect_ratio=draw(st.one_of(st.none(), st.floats(1, 5))),
        min_side_px=draw(st.one_of(st.none(), st.integers(1, 500))),
        languages=draw(st.sampled_from([None, ("en",), ("zh", "en"), ("ja", "other")])),
        mismatch=draw(st.sampled_from(["keep", "drop", "relabel"])),
        evaluation_near=draw(st.sampled_from([None, 0, 2])),
    )


ROWS = st.lists(measured_rows(), min_size=1, max_size=12)


def table_of(rows: list[dict[str, Any]]) -> pa.RecordBatch:
    return pa.Table.from_pylist(rows, schema=MEASURED).combine_chunks().to_batches()[0]


def decide(rows: list[dict[str, Any]], wanted: CurationSettings) -> list[dict[str, Any]]:
    decided: list[dict[str, Any]] = apply_rules(table_of(rows), build_rules(wanted, EVALUATION)).to_pylist()
    return decided


@settings(max_examples=80)
@given(rows=ROWS, wanted=any_settings(), data=st.data())
def test_neither_batches_nor_order_matter(rows: list[dict[str, Any]], wanted: CurationSettings, data: Any) -> None:
    whole = decide(rows, wanted)
    cut = data.draw(st.integers(1, len(rows)))
    parts = [decide(part, wanted) for part in (rows[:cut], rows[cut:]) if part]
    assert [row for part in parts for row in part] == whole
    order = data.draw(st.permutations(range(len(rows))))
    assert decide([rows[place] for place in order], wanted) == [whole[place] for place in order]


@settings(max_examples=40)
@given(rows=ROWS, wanted=any_settings())
def test_rules_are_pure(rows: list[dict[str, Any]], wanted: CurationSettings) -> None:
    batch = table_of(rows)
    rules = build_rules(wanted, EVALUATION)
    first = apply_rules(batch, rules)
    assert batch.equals(table_of(rows)), "what a rule is given stays as it is"
    assert apply_rules(batch, rules).equals(first)
    for column in batch.schema.names:
        assert first.column(column).equals(batch.column(column)), f"{column}: was measured, not decided"


@settings(max_examples=60)
@given(rows=ROWS, wanted=any_settings())
def test_every_row_is_decided(rows: list[dict[str, Any]], wanted: CurationSettings) -> None:
    for row in decide(rows, wanted):
        assert row["keep"] == (row["reason"] is None)
        assert row["reason"] == row["fault"] if row["fault"] else True
        assert (row["language"] is None) == (row["text"] is None)
        assert not row["keep"] or row["language"] in (*LANGUAGES, None)
        if wanted.languages is not None and row["keep"]:
            assert row["detected"] in (*wanted.languages, "none")


def stricter(wanted: CurationSettings, draw: Any) -> CurationSettings:
    """Settings that may only drop more."""
    more = st.integers(0, 5)
    lengths = {
        name: dataclasses.replace(limit, least=(limit.least or 0) + draw(more))
        for name, limit in wanted.lengths.items()
    }
    return dataclasses.replace(
        wanted,
        lengths=lengths | {"en": dataclasses.replace(lengths["en"], most=max(9, lengths["en"].least or 0))},
        exempt_roles=(),
        max_aspect_ratio=draw(st.floats(1, wanted.max_aspect_ratio or 5)),
        min_side_px=(wanted.min_side_px or 1) + draw(st.integers(0, 300)),
        languages=draw(st.sampled_from([wanted.languages, ("en",)]))
        if wanted.languages != ("ja", "other")
        else ("ja",),
        evaluation_near=(wanted.evaluation_near or 0) + draw(st.sampled_from([0, 2])),
    )


@settings(max_examples=80)
@given(rows=ROWS, wanted=any_settings(), data=st.data())
def test_stricter_settings_keep_a_subset(rows: list[dict[str, Any]], wanted: CurationSettings, data: Any) -> None:
    loose, strict = decide(rows, wanted), decide(rows, stricter(wanted, data.draw))
    for before, after in zip(loose, strict, strict=True):
        assert before["keep"] or not after["keep"]


@settings(max_examples=60)
@given(
    scores=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=10),
    low=st.floats(-1, 1),
    high=st.floats(-1, 1),
)
def test_scores_split_where_they_are_cut(scores: list[float], low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    keep, reason = pa.array([True] * len(scores)), pa.nulls(len(scores), pa.string())
    batch = pa.record_batch({"score": pa.array(scores, pa.float32()), "keep": keep, "reason": reason})
    found = check_score(batch, drop_below=low, rewrite_below=high).to_pylist()
    for score, row in zip(scores, found, strict=True):
        assert row["reason"] == ("low_score" if score < low else None)
        assert row["rewrite"] == (low <= score < high)
