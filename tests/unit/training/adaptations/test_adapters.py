"""Adapters change nothing at the start, train alone, and leave pictures and the other language as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from m2_encoder.errors import UserError
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.training.adaptation import check_adaptation, merge_adaptation
from m2_encoder.training.adaptations.adapters import PerLanguage
from m2_encoder.training.optim import build_optimizer
from tests.support.added_parts import FewPieces, adapted_config, without_parts
from tests.support.models import random_images, random_model, random_text, small_config
from tests.support.training import LIGHTNING_WARNINGS, make_datamodule, make_module, make_tokenizer, make_trainer

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

TEXTS = {"zh": ["一只猫", "红 apple", "龙"], "en": ["a cat", "2 + 2", "", "☂", "un éléphant"]}


def prepared(*args: Any, **kwargs: Any) -> PerLanguage:
    adaptation = PerLanguage(*args, **kwargs)
    adaptation.prepare(make_tokenizer())
    return adaptation


@torch.no_grad()
def test_the_start_is_the_base_and_the_merged_model_a_plain_one() -> None:
    torch.manual_seed(1)
    model = random_model(small_config())
    images, text = random_images(model.config, 3), random_text(model.config, [7, 3, 9])
    before = model.encode_image(images), model.encode_text(text)
    adaptation: Any = PerLanguage(width=3)
    adaptation.prepare(FewPieces(model.config.vocab_size))
    adaptation.apply(model)
    assert all(map(torch.equal, (model.encode_image(images), model.encode_text(text)), before))
    merged = merge_adaptation(adaptation, model)
    assert merged is model
    assert merged.config.adapter_width == 3
    plain = M2Encoder(merged.config).eval()
    plain.load_state_dict(merged.state_dict())
    assert plain.encode_text(text).equal(merged.encode_text(text))


@pytest.mark.parametrize("language", ["zh", "en"])
def test_one_language_is_trained_and_the_other_stays(language: str, emoji_folder: Path, tmp_path: Path) -> None:
    module = make_module(
        adaptation=prepared(width=4, languages=[language]),
        optimizer=lambda each: build_optimizer(each, lr=1e-2, weight_decay=0.5),
        max_steps=3,
    )
    module.configure_model()
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    make_trainer(tmp_path, max_steps=3).fit(module, make_datamodule(emoji_folder, max_steps=3))
    moved = {name for name, value in module.model.state_dict().items() if not torch.equal(value, before[name])}
    name = f"backbone.layers.0.adapters.{language}"
    assert moved == {f"{name}.{part}.{kind}" for part in ("up", "down") for kind in ("weight", "bias")} | {
        "logit_scale"
    }
    model, tokenizer = merge_adaptation(module.adaptation, module.model).eval(), make_tokenizer()
    base = without_parts(model)
    with torch.no_grad():
        for each, texts in TEXTS.items():
            for text in map(tokenizer, texts):
                assert model.encode_text(text).equal(base.encode_text(text)) == (each != language)
        images = random_images(model.config, 2)
        assert model.encode_image(images).equal(base.encode_image(images))


def test_trained_parameters_are_counted_before_a_start() -> None:
    adaptation = prepared(width=5)
    with torch.device("meta"):
        model = M2Encoder(small_config(vocab_size=3500))
        adaptation.apply(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 + 2 * 2 * (2 * 5 * 16 + 5 + 16)


def test_what_does_not_fit_is_refused_before_a_start() -> None:
    with pytest.raises(UserError, match=r"width=0: must be"):
        PerLanguage(width=0)
    with pytest.raises(UserError, match=r"languages=\['fr'\]: must be"):
        PerLanguage(languages=["fr"])  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"adaptation\.width=64: would replace the adapters"):
        check_adaptation(prepared(), adapted_config(vocab_size=3500))
    without: Any = FewPieces(40)
    without.pieces = lambda ids: ["cat" for _ in ids]
    with pytest.raises(UserError, match="the tokenizer has no piece with one"):
        PerLanguage().prepare(without)
