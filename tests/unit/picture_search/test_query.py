"""What queries are read as, and their features against sums made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m2_encoder.errors import UserError
from m2_encoder.picture_search.model import SearchModel
from m2_encoder.picture_search.query import Term, encode_query, parse_query
from tests.support.pictures import FEATURE_DIM


def words(content: str, weight: float = 1.0) -> Term:
    return Term(weight, "words", content)


def picture(content: str, weight: float = 1.0) -> Term:
    return Term(weight, "picture", content)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("红色的水果", [words("红色的水果")]),
        ("  a red fruit ", [words("a red fruit")]),
        ("New York - skyline + sea", [words("New York - skyline + sea")]),
        ("black-and-white", [words("black-and-white")]),
        ("E=mc2 ${x} 100% {a,b} [c]", [words("E=mc2 ${x} 100% {a,b} [c]")]),
        ('a sign that says "stop"', [words('a sign that says "stop"')]),
        ("C++ or T-shirt + 红＋蓝", [words("C++ or T-shirt + 红＋蓝")]),
        ("-", [words("-")]),
        ("pool.jpg", [picture("pool.jpg")]),
        ("beach/my pool.JPEG", [picture("beach/my pool.JPEG")]),
        ("pool.jpg at night", [words("pool.jpg at night")]),
        ('2*"狗" + pool.jpg - "水果"', [words("狗", 2), picture("pool.jpg"), words("水果", -1)]),
        ("“狗”+「猫」-0.5×海滩/a-b.png", [words("狗"), words("猫"), picture("海滩/a-b.png", -0.5)]),
        ('- "fruit"', [words("fruit", -1)]),
        ('"my pool.jpg" + "a - b"', [picture("my pool.jpg"), words("a - b")]),
        ("a.heic + b.heic", [picture("a.heic"), picture("b.heic")]),
        ('2＊"狗" － "水果"＋pool.jpg', [words("狗", 2), words("水果", -1), picture("pool.jpg")]),
    ],
)
def test_reading(text: str, terms: list[Term]) -> None:
    assert parse_query(text) == terms


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ('"狗" + 水果', r"cannot be read from \+ 水果 on"),
        ('狗 + "水果"', "cannot be read from 狗"),
        ('2*"狗" "猫"', 'cannot be read from "猫" on'),
        ('0*"狗"', "has the weight 0"),
        ('1000*"狗"', "has the weight 1000; weights are above 0, at most 100"),
        ('"" + "a"', "a term without words"),
        ('2*"狗', 'cannot be read from 2\\*"狗 on'),
        ("2*狗 + 水果", r"cannot be read from 2\*狗 \+ 水果 on"),
        ('0.0001*"a', "cannot be read from 0.0001"),
        ('"红色" "水果"', 'cannot be read from "水果" on'),
        ('"stop" sign', "cannot be read from sign on"),
        ('pool.jpg － "水果', "cannot be read from － .水果 on"),
        (" + ".join(['"a"'] * 17), "has 17 terms"),
        ("长" * 5000, "has 5,000 characters"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_query(text)
    assert caught.value.key == "query"


@pytest.mark.parametrize("name", ["holiday.jpg-1.png", "2*x.png", '中文/红 苹果 - "引号".png', " a.png"])
def test_a_picture_s_own_name_wins(name: str) -> None:
    assert parse_query(name, is_picture=[name].__contains__) == [picture(name)]
    assert parse_query(f"\n{name} ", is_picture=[name.strip()].__contains__) == [picture(name.strip())]


@given(st.text(max_size=60))
def test_every_text_is_read_or_refused(text: str) -> None:
    try:
        terms = parse_query(text)
    except UserError:
        return
    assert terms
    assert all(term.content and term.weight for term in terms)


def test_features_are_the_weighted_sum(model: SearchModel, photos: Path) -> None:
    encoder: Any = model.encoder.model
    with torch.no_grad():
        texts = encoder.encode_text(model.encoder.tokenizer(["狗", "水果"])).numpy()
        pool = encoder.encode_image(model.encoder.preprocess(photos / "a.jpg")[None])[0].numpy()
    expected = 2 * texts[0] + pool - texts[1]
    found = encode_query(
        parse_query('2*"狗" + a.jpg - "水果"'), model.encoder, picture=lambda name: (photos / name).read_bytes()
    )
    assert (found.shape, found.dtype) == ((FEATURE_DIM,), np.float32)
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), atol=1e-5)
    known = encode_query(parse_query('2*"狗" + a.jpg - "水果"'), model.encoder, picture=lambda _: pool)
    np.testing.assert_allclose(known, found, atol=1e-5)


def test_unusable_terms(model: SearchModel) -> None:
    def refuse(name: str) -> bytes:
        raise UserError(f"{name}: no such picture", key="query")

    with pytest.raises(UserError, match="cancel each other"):
        encode_query(parse_query('"狗" - "狗"'), model.encoder, picture=refuse)
    with pytest.raises(UserError, match=r"x\.png: no such picture"):
        encode_query(parse_query("x.png"), model.encoder, picture=refuse)
    with pytest.raises(UserError, match=r"query: x\.png: not an image that is read here, but something unknown"):
        encode_query(parse_query("x.png"), model.encoder, picture=lambda _: b"none")
