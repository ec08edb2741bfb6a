"""What an adaptation locks does not move; with the one that changes nothing, nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from m2_encoder.errors import UserError
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.training.adaptation import Adaptation, Full, check_adaptation, merge_adaptation
from m2_encoder.training.optim import build_optimizer
from tests.support.training import LIGHTNING_WARNINGS, make_datamodule, make_module, make_trainer, tiny_config

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]


class LockedTower(Adaptation):
    """The vision tower and the temperature stay as they are."""

    def apply(self, model: M2Encoder) -> None:
        model.logit_scale.requires_grad_(False).fill_(-1)  # outside of the bounds that a trained one is kept in
        model.image_embed.requires_grad_(False)
        for name, parameter in model.backbone.named_parameters():
            parameter.requires_grad_("vision_expert" not in name)

    def merge(self, model: M2Encoder) -> M2Encoder:
        return model


class Narrow(Full):
    """Gives back something else than a plain model."""

    def merge(self, model: M2Encoder) -> M2Encoder:
        model.pooler = torch.nn.Linear(1, 1)
        return model


def test_a_locked_tower_does_not_move(emoji_folder: Path, tmp_path: Path) -> None:
    def optimizer(module: Any) -> Any:
        return build_optimizer(module, lr=1e-2, weight_decay=0.5)

    module = make_module(adaptation=LockedTower(), optimizer=optimizer, max_steps=3)
    module.configure_model()
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    make_trainer(tmp_path, max_steps=3).fit(module, make_datamodule(emoji_folder, max_steps=3))
    moved = {name for name, value in module.model.state_dict().items() if not torch.equal(value, before[name])}
    trained = {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    assert moved <= trained
    assert {"text_embed.tokens.weight", "vl_image_proj.weight", "backbone.layers.0.text_expert.fc1.weight"} <= moved
    assert not any(name.startswith(("image_embed", "backbone.norm.vision", "logit_scale")) for name in moved)


def test_full_is_the_model_itself() -> None:
    model = M2Encoder(tiny_config())
    Full().apply(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert merge_adaptation(Full(), model) is model


def test_no_plain_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"adaptation=Narrow: .*plain model; it differs in pooler.bias and 1 more"):
        check_adaptation(Narrow(), tiny_config())
