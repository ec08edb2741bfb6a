"""Which caption is drawn: shares, languages, roles, messages."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2_encoder.data.emoji.dataset import load_emoji_concepts
from m2_encoder.data.samples.captions import CAPTION_ROLES, Caption, CaptionSampler, first_sentence
from m2_encoder.data.samples.parse import SampleProblem, SampleText, parse_sample_text
from m2_encoder.errors import UserError
from m2_encoder.types import LANGUAGES

EVEN = dict.fromkeys(LANGUAGES, 1.0)
ROLES = {"name": 0.4, "alias": 0.2, "keyword": 0.2, "mixed": 0.2}
CAT = {
    "captions": {"en": ["cat", "kitty", "pet", "whiskers", "meow"], "zh": ["猫", "宠物"]},
    "caption_roles": {"en": ["name", "alias", "keyword", "keyword", "keyword"], "zh": ["name", "keyword"]},
}
DRAWS = 4000


def said(metadata: dict[str, Any]) -> SampleText:
    return parse_sample_text(json.dumps(metadata).encode(), None)


def draws(sampler: CaptionSampler, metadata: dict[str, Any], number: int = DRAWS) -> list[Caption]:
    rng = np.random.default_rng(3)
    text = said(metadata)
    return [caption for _ in range(number) for caption in sampler(text, rng=rng)]


def assert_shares(counts: Counter[str], shares: dict[str, float]) -> None:
    """Every count within five standard deviations of its expectation, and nothing else drawn."""
    total = sum(counts.values())
    assert set(counts) == {key for key, share in shares.items() if share}
    for key, share in shares.items():
        tolerance = 5 * math.sqrt(share * (1 - share) / total)
        assert abs(counts[key] / total - share) <= tolerance, (key, counts[key] / total, share)


@pytest.mark.parametrize("weights", [{"zh": 0.5, "en": 0.5}, {"zh": 3, "en": 1}, {"en": 2.0}, {"zh": 1, "en": 0}])
def test_languages_are_drawn_by_weight(weights: dict[str, float]) -> None:
    sampler = CaptionSampler(language_weights=weights, role_weights=ROLES)
    counts = Counter(caption.language for caption in draws(sampler, CAT))
    assert_shares(counts, {key: value / sum(weights.values()) for key, value in weights.items()})


def role_of(text: str) -> str:
    """The role that a drawn English caption of CAT can only have come from; single keywords are ambiguous."""
    if ", " in text:
        return "list"
    return dict(zip(CAT["captions"]["en"], CAT["caption_roles"]["en"], strict=True))[text]


def test_roles_are_drawn_by_weight() -> None:
    sampler = CaptionSampler(language_weights={"en": 1}, role_weights={"name": 5, "alias": 3, "keyword": 2})
    counts = Counter(role_of(caption.text) for caption in draws(sampler, CAT))
    assert_shares(counts, {"name": 0.5, "alias": 0.3, "keyword": 0.2})


def test_captions_of_a_role_are_equally_likely() -> None:
    sampler = CaptionSampler(language_weights={"en": 1}, role_weights={"keyword": 1})
    counts = Counter(caption.text for caption in draws(sampler, CAT))
    assert_shares(counts, {"pet": 1 / 3, "whiskers": 1 / 3, "meow": 1 / 3})


def test_a_missing_role_passes_its_share_to_the_others() -> None:
    sampler = CaptionSampler(language_weights={"zh": 1}, role_weights={"name": 1, "alias": 6, "keyword": 3})
    counts = Counter(caption.text for caption in draws(sampler, CAT))
    assert_shares(counts, {"猫": 0.25, "宠物": 0.75})


def test_without_any_weighted_role_every_caption_is_equally_likely() -> None:
    metadata = {
        "captions": {"en": ["a", "b", "c", "d"]},
        "caption_roles": {"en": ["keyword", "keyword", "keyword", "name"]},
    }
    sampler = CaptionSampler(language_weights=EVEN, role_weights={"alias": 1})
    assert_shares(Counter(caption.text for caption in draws(sampler, metadata)), dict.fromkeys("abcd", 0.25))


def test_a_source_without_roles_gives_names() -> None:
    sampler = CaptionSampler(language_weights=EVEN, role_weights={"name": 1, "mixed": 1})
    counts = Counter(caption.text for caption in draws(sampler, {"captions": {"en": ["one", "two"]}}))
    assert_shares(counts, {"one": 0.5, "two": 0.5})


def test_lists_of_keywords() -> None:
    sampler = CaptionSampler(language_weights={"en": 1}, role_weights={"mixed": 1}, max_keywords=2)
    keywords = {"pet", "whiskers", "meow"}
    lengths, with_name = Counter[str](), Counter[str]()
    for text, _ in draws(sampler, CAT):
        parts = text.split(", ")
        assert len(set(parts)) == len(parts), "nobody searches for the same word twice"
        assert set(parts) <= {*keywords, "cat"}
        lengths[str(len(set(parts) & keywords))] += 1
        with_name[str("cat" in parts)] += 1
    assert_shares(lengths, {"1": 0.5, "2": 0.5})
    assert_shares(with_name, {"True": 0.5, "False": 0.5})


def test_chinese_lists_have_chinese_commas() -> None:
    sampler = CaptionSampler(language_weights={"zh": 1}, role_weights={"mixed": 1})
    assert {text for text, _ in draws(sampler, CAT, 200)} == {"宠物", "猫，宠物", "宠物，猫"}


@given(seed=st.integers(0, 2**32), concept=st.sampled_from(load_emoji_concepts()))
def test_draws_are_a_function_of_the_generator(seed: int, concept: Any) -> None:
    metadata = {
        "captions": {language: concept.captions[language].texts() for language in LANGUAGES},
        "caption_roles": {language: concept.captions[language].roles() for language in LANGUAGES},
    }
    sampler = CaptionSampler(language_weights=EVEN, role_weights=ROLES)
    again = CaptionSampler(language_weights=dict(reversed(EVEN.items())), role_weights=dict(reversed(ROLES.items())))
    first = sampler(said(metadata), rng=np.random.default_rng(seed))
    assert first == again(said(metadata), rng=np.random.default_rng(seed)), "the order of a mapping must not matter"
    (caption,) = first
    assert caption.text.strip()
    assert caption.language in LANGUAGES


def test_a_sample_that_nothing_can_be_drawn_of_is_named() -> None:
    sampler = CaptionSampler(language_weights={"en": 1}, role_weights=ROLES)
    with pytest.raises(SampleProblem, match="missing_caption: no caption in en"):
        sampler(said({"captions": {"zh": ["猫"]}}), rng=np.random.default_rng(0))
    with pytest.raises(SampleProblem, match="wrong_type: unknown role title of 'en'; known: name, alias, keyword"):
        sampler(said({"captions": {"en": ["a"]}, "caption_roles": {"en": ["title"]}}), rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"language_weights": {"fr": 1}}, "language_weights=.*for some of en, zh"),
        (
            {"role_weights": {"title": 1, "name": 1}},
            f"role_weights=.*for some of {', '.join(CAPTION_ROLES)}",
        ),
        ({"language_weights": {}}, "language_weights={}"),
        ({"language_weights": {"en": 0, "zh": 0.0}}, "not all 0"),
        ({"role_weights": {"name": -1, "alias": 2}}, "role_weights=.*-1"),
        ({"role_weights": {"name": math.nan}}, "role_weights=.*nan"),
        ({"role_weights": {"name": math.inf}}, "role_weights=.*inf"),
        ({"role_weights": {"name": "much"}}, "role_weights=.*much"),
        ({"max_keywords": 0}, "max_keywords=0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CaptionSampler(**{"language_weights": EVEN, "role_weights": ROLES, **arguments})


def test_every_language_speaks_once_per_image() -> None:
    sampler = CaptionSampler(language_weights={"zh": 0.1, "en": 0.9}, role_weights=ROLES, every_language=True)
    assert sampler.captions_per_image == 2
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert [caption.language for caption in sampler(said(CAT), rng=rng)] == ["en", "zh"]
    lone = {"captions": {"zh": ["猫"]}}
    assert [caption.language for caption in sampler(said(lone), rng=rng)] == ["zh", "zh"]
    one = CaptionSampler(language_weights={"zh": 1, "en": 0}, role_weights=ROLES, every_language=True)
    assert one.captions_per_image == 1


LONG = {
    "captions": {
        "en": [
            {"text": "A 3.5 m boat on a lake. It is red! Two people row.", "role": "rewritten"},
            {"text": "boat", "role": "name"},
        ],
        "zh": [{"text": "湖上有一只船。船是红色的。", "role": "rewritten"}],
    }
}


def test_a_short_caption_follows_each_long_one() -> None:
    every = CaptionSampler(language_weights=EVEN, role_weights={"rewritten": 1}, every_language=True, short="name")
    assert every.captions_per_image == 4
    flat = draws(every, LONG)
    assert flat[:4] == [
        (LONG["captions"]["en"][0]["text"], "en"),
        ("boat", "en"),
        ("湖上有一只船。船是红色的。", "zh"),
        ("湖上有一只船", "zh"),
    ]
    first = CaptionSampler(language_weights={"en": 1}, role_weights={"rewritten": 1}, short="first_sentence")
    assert first.captions_per_image == 2
    assert {text for text, _ in draws(first, LONG)[1::2]} == {"A 3.5 m boat on a lake"}


def test_what_is_short_is_no_long_caption_where_there_are_others() -> None:
    sampler = CaptionSampler(language_weights={"en": 1}, role_weights={"rewritten": 1, "name": 9}, short="name")
    assert {text for text, _ in draws(sampler, LONG)[0::2]} == {LONG["captions"]["en"][0]["text"]}
    alone = {"captions": {"en": [{"text": "boat", "role": "name"}]}}
    assert {text for text, _ in draws(sampler, alone)} == {"boat"}


@pytest.mark.parametrize("text", ["no mark", "。", "...", "v1.2 is here"])
def test_a_text_without_a_first_sentence_is_its_own(text: str) -> None:
    assert first_sentence(text) == text
