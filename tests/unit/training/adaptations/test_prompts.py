"""Prompts are all that moves, towers stay coupled, and what is exported computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from m2_encoder.errors import UserError
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.training.adaptation import check_adaptation, merge_adaptation
from m2_encoder.training.adaptations.prompts import CoupledPrompts, DeepPrompts
from m2_encoder.training.optim import build_optimizer
from tests.support.added_parts import adapted_config
from tests.support.models import random_images, random_model, random_text, small_config
from tests.support.training import LIGHTNING_WARNINGS, make_datamodule, make_module, make_trainer

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]


def test_only_prompts_coupling_and_temperature_move(emoji_folder: Path, tmp_path: Path) -> None:
    module = make_module(
        adaptation=DeepPrompts(3), optimizer=lambda each: build_optimizer(each, lr=1e-2, weight_decay=0.5), max_steps=3
    )
    module.configure_model()
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    make_trainer(tmp_path, max_steps=3).fit(module, make_datamodule(emoji_folder, max_steps=3))
    moved = {name for name, value in module.model.state_dict().items() if not torch.equal(value, before[name])}
    prompts = {f"backbone.layers.0.prompts.{name}" for name in ("text", "coupling.weight", "coupling.bias")}
    assert moved == {*prompts, "logit_scale"}


@torch.no_grad()
def test_merged_equals_unmerged() -> None:
    torch.manual_seed(1)
    model = random_model(small_config(), dtype=torch.float64)
    adaptation = DeepPrompts(num_prompts=4, layers=1)
    torch.set_default_dtype(torch.float64)
    try:
        adaptation.apply(model)
    finally:
        torch.set_default_dtype(torch.float32)
    images, text = random_images(model.config, 3, dtype=torch.float64), random_text(model.config, [7, 3])
    before = model.encode_image(images), model.encode_text(text)
    coupled = model.backbone.layers[0].prompts
    assert isinstance(coupled, CoupledPrompts)
    expected = coupled.text @ coupled.coupling.weight.t() + coupled.coupling.bias
    merged = merge_adaptation(adaptation, model)
    assert (merged.config.num_prompts, merged.config.prompt_layers) == (4, 1)
    torch.testing.assert_close(merged.backbone.layers[0].prompts.vision, expected)
    torch.testing.assert_close((merged.encode_image(images), merged.encode_text(text)), before)
    plain = M2Encoder(merged.config).double().eval()
    plain.load_state_dict(merged.state_dict())
    assert plain.encode_image(images).equal(merged.encode_image(images))


def test_trained_parameters_are_counted_before_a_start() -> None:
    with torch.device("meta"):
        model = M2Encoder(small_config())
        DeepPrompts(num_prompts=5).apply(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 + 2 * (5 * 16 + 16 * 16 + 16)


def test_what_does_not_fit_is_refused_before_a_start() -> None:
    with pytest.raises(UserError, match=r"adaptation\.layers=3: must not exceed 2, the layers of the backbone"):
        check_adaptation(DeepPrompts(layers=3), small_config())
    with pytest.raises(UserError, match=r"adaptation\.num_prompts=4: would replace the prompts"):
        check_adaptation(DeepPrompts(), adapted_config())
    with pytest.raises(UserError, match=r"num_prompts=0: must be"):
        DeepPrompts(num_prompts=0)
    check_adaptation(DeepPrompts(), adapted_config(num_prompts=0, prompt_layers=0))  # beside adapters
