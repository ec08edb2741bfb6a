"""Model cards are in both languages, and say numbers once."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from m2_encoder import M2Encoder
from m2_encoder.checkpoints.card import CardInfo, build_card, model_card
from m2_encoder.checkpoints.card_words import CHINESE, Words, heading, label, line, paragraphs
from m2_encoder.config.compose import open_composer
from tests.support.models import random_model, small_config

_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_METRICS = {"heldout_style": {"zh": {"t2i_r@1": 41.26}, "chance": {"t2i_r@1": 0.07}}}
_ORIGIN = {"run": "try", "git_revision": "abc", "command": "m2-train", "heldout_style": "twemoji", "versions": "torch"}


@pytest.fixture(scope="module")
def model() -> M2Encoder:
    return random_model(small_config())


@pytest.fixture(scope="module", params=[None, "start.safetensors"])
def info(request: pytest.FixtureRequest, repo_root: Any) -> CardInfo:
    with open_composer(repo_root / "conf", "train") as composer:
        cfg = composer.compose(["+experiment=emoji"]).cfg
    return build_card({**cfg, "model": {**cfg["model"], "weights": request.param}}, steps="3,000")


def _lines(card: str) -> list[str]:
    return [each for each in re.sub(r"```.*?```", "", card, flags=re.DOTALL).splitlines() if each]


def test_all_that_a_run_s_card_says_has_chinese(model: M2Encoder, info: CardInfo) -> None:
    lines = _lines(model_card(model, card=info, metrics=_METRICS, provenance=_ORIGIN))
    assert lines[0] == "# M2-Encoder, run emoji", "a name"
    for each in lines:
        if each.startswith(("##", "- ")):
            assert _CHINESE.search(each), each
    sentences = [each for each in lines[1:] if not each.startswith(("#", "-", "|"))]
    is_chinese = [bool(_CHINESE.search(each)) for each in sentences]
    both = [" / " in each for each in sentences]
    alone = [chinese for chinese, together in zip(is_chinese, both, strict=True) if not together]
    assert alone == [True, False] * (len(alone) // 2), "each sentence below its Chinese"
    headers = [row for row, below in itertools.pairwise(lines) if below.startswith("| ---")]
    assert len(headers) == 2
    assert "source · 来源" in headers[0]


def test_what_a_run_s_card_is_made_of_has_chinese(info: CardInfo) -> None:
    said = [info.summary, *info.limits, *info.training, *(each.note for each in info.data), *_ORIGIN, *_METRICS]
    assert not [text for text in said if text not in CHINESE and text != "heldout_style"]


def test_numbers_stand_once(model: M2Encoder, info: CardInfo) -> None:
    card = model_card(model, card=info, metrics=_METRICS, provenance=_ORIGIN)
    for part in ("41.3", "3,000", f"{sum(each.numel() for each in model.parameters()):,}", "https://openmoji.org"):
        assert card.count(part) == 1, part


def test_texts_of_users_stay_as_they_are() -> None:
    for text in ("Our camera traps.", "我们的照片。", "", "| a |"):
        assert label(text) == line(text) == paragraphs(text) == text
    assert heading("Use") == "## Use · 用法"
    assert heading("my split", 3) == "### my split"
    assert line("aliases") == "别名 / aliases"
    assert Words("a", "一").paragraphs == "一\n\na"
