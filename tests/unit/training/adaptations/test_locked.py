"""Locked parts stay as they are to the bit, and so do the features of a locked tower."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from m2_encoder.config.check import check_settings
from m2_encoder.errors import UserError
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.training.adaptation import check_adaptation
from m2_encoder.training.adaptations.locked import Locked
from m2_encoder.training.optim import build_optimizer
from tests.support.models import random_images, random_model, random_text
from tests.support.training import LIGHTNING_WARNINGS, make_datamodule, make_module, make_trainer, tiny_config

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

CONFIG = tiny_config(num_layers=2)


def locked_names(**arguments: object) -> set[str]:
    model = M2Encoder(CONFIG)
    Locked(**arguments).apply(model)  # type: ignore[arg-type]
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize("tower", ["image", "text"])
def test_features_of_a_locked_tower_stay_the_same_to_the_bit(tower: str, emoji_folder: Path, tmp_path: Path) -> None:
    """LiT: shared layers are locked with it, or texts would change the features of pictures."""
    start = random_model(CONFIG)
    module = make_module(
        model=CONFIG,
        initial_state=start.state_dict(),
        adaptation=Locked(towers=[tower]),  # type: ignore[list-item]
        optimizer=partial(build_optimizer, lr=1e-2, weight_decay=0.5),
        max_steps=2,
    )
    make_trainer(tmp_path, max_steps=2).fit(module, make_datamodule(emoji_folder, max_steps=2))
    ended = module.model.eval()
    images, text = random_images(CONFIG, 3), random_text(CONFIG, [3, 7])
    with torch.no_grad():
        pairs = {
            "image": (start.encode_image_heads(images), ended.encode_image_heads(images)),
            "text": (start.encode_text_heads(text), ended.encode_text_heads(text)),
        }
    for name, (before, after) in pairs.items():
        assert torch.equal(before.features, after.features) == (name == tower)
        assert torch.equal(before.backbone_features, after.backbone_features) == (name == tower)


def test_parts_by_their_words() -> None:
    model = M2Encoder(CONFIG)
    names = {name for name, _ in model.named_parameters()}
    first = {name for name in names if name.startswith("backbone.layers.0.")}
    assert locked_names(layers=1) == first
    experts = {name for name in names if name.startswith("backbone.") and ".text_expert" in name}
    assert locked_names(experts=["text_expert"], layers=1) == first | experts
    assert locked_names(embeddings=["text"]) == {"text_embed.tokens.weight", "text_embed.positions.weight"}
    heads = {"image_proj.weight", "text_proj.weight", "vl_image_proj.weight", "vl_text_proj.weight"}
    assert locked_names(heads=True, logit_scale=True) == {*heads, "logit_scale", "logit_vl_scale"}
    image = locked_names(towers=["image"])
    assert {"image_embed.mask_token", "vl_encoder.layers.0.vision_expert.fc1.weight", "vl_image_proj.weight"} <= image
    assert not {"vl_text_proj.weight", "logit_scale", "backbone.layers.1.text_expert.fc1.weight"} & image


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"towers": ["picture"]}, r"towers=\['picture'\]: must be .*image, text"),
        ({"experts": ["vision"]}, r"experts=\['vision'\]: must be .*vision_expert, text_expert"),
        ({"embeddings": ["words"]}, r"embeddings=\['words'\]: must be .*image, text"),
        ({"layers": 3}, r"layers=3: must be at most 2, the layers of the backbone"),
        ({"layers": -1}, r"layers=-1: must be a whole number"),
        ({}, r"locks nothing; give towers, layers"),
        ({"towers": ["image", "text"]}, r"locks everything that features depend on"),
    ],
)
def test_what_cannot_be_locked(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_adaptation(Locked(**arguments), CONFIG)  # type: ignore[arg-type]


def test_an_empty_default_is_not_proposed() -> None:
    (problem,) = check_settings(Locked, {"towers": ["picture"]})
    assert problem.fix == "for example towers=[image]", "the shipped file locks the image tower, the class nothing"
