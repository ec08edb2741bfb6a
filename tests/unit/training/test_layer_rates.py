"""Learning rates by layer and tower, of both optimizers, against BEiT's formula spelt out name by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from m2_encoder.errors import UserError
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.training.layer_rates import rate_ratios
from m2_encoder.training.optim import (
    build_muon,
    build_optimizer,
    key_by_name,
    learning_rates,
    main_learning_rate,
    parameter_groups,
    warmup_constant,
)
from tests.support.training import tiny_config

LR, DECAY, IMAGE, TEXT = 1e-3, 0.7, 0.5, 0.1
IMAGE_PARTS = ("image_embed.", "image_proj.", "vl_image_proj.")
TEXT_PARTS = ("text_embed.", "text_proj.", "vl_text_proj.")


@pytest.fixture(scope="module")
def module() -> nn.ModuleDict:
    """Three layers below, two of vision and language, named as in training."""
    return nn.ModuleDict({"model": M2Encoder(tiny_config(num_layers=3, num_vl_layers=2))})


def expected(name: str) -> float:
    """A table of what BEiT gives five layers: ids 0 to 6."""
    own = name.removeprefix("model.")
    powers = {"image_embed.": 6, "text_embed.": 6, "backbone.norm.": 3}
    powers |= {f"backbone.layers.{i}.": 5 - i for i in range(3)} | {f"vl_encoder.layers.{i}.": 2 - i for i in range(2)}
    rate = LR * DECAY ** next((power for part, power in powers.items() if own.startswith(part)), 0)
    if own.startswith(IMAGE_PARTS) or (own.startswith("backbone.") and ".vision_expert." in own):
        return rate * IMAGE
    return rate * TEXT if own.startswith(TEXT_PARTS) or own.startswith("backbone.") else rate


def rates(groups: list[dict[str, Any]]) -> dict[str, float]:
    return {name: group["lr"] for group in groups for name in group["names"]}


def test_every_parameter_has_the_rate_of_its_layer_and_tower(module: nn.ModuleDict) -> None:
    wanted = {name: expected(name) for name, _ in module.named_parameters()}
    more: dict[str, Any] = {"layer_decay": DECAY, "image_lr_ratio": IMAGE, "text_lr_ratio": TEXT}
    adamw = build_optimizer(module, lr=LR, logit_scale_lr_ratio=10, **more)
    scales = {"model.logit_scale": 10 * LR, "model.logit_vl_scale": 10 * LR}
    assert rates(adamw.param_groups) == pytest.approx(wanted | scales, rel=1e-12)
    muon = build_muon(module, lr=LR, matrix_lr=3 * LR, **more)
    matrices = {n: p.ndim == 2 and ".layers." in n for n, p in module.named_parameters()}
    assert rates(muon.param_groups) == pytest.approx(
        {name: rate * (3 if matrices[name] else 1) for name, rate in wanted.items()}, rel=1e-12
    )


def test_defaults_give_the_groups_of_before(module: nn.ModuleDict) -> None:
    groups = parameter_groups(module.named_parameters(), lr=LR, weight_decay=0.2, logit_scale_lr_ratio=3.0)
    assert [(g["name"], g["lr"], g["weight_decay"], sorted(g)) for g in groups] == [
        ("decayed", LR, 0.2, ["lr", "name", "names", "params", "weight_decay"]),
        ("plain", LR, 0.0, ["lr", "name", "names", "params", "weight_decay"]),
        ("scales", LR * 3.0, 0.0, ["lr", "name", "names", "params", "weight_decay"]),
    ]
    assert [name for g in groups for name in g["names"] if g["name"] == "decayed"] == [
        name for name, _ in module.named_parameters() if name in set(groups[0]["names"])
    ]
    ratio = rate_ratios(name for name, _ in module.named_parameters())
    again = parameter_groups(module.named_parameters(), lr=LR, weight_decay=0.2, logit_scale_lr_ratio=3.0, ratio=ratio)
    assert [{**g, "params": len(g["params"])} for g in again] == [{**g, "params": len(g["params"])} for g in groups]


def test_logs_stay_few_and_the_main_rate_is_that_of_the_configuration(module: nn.ModuleDict) -> None:
    optimizer = build_optimizer(module, lr=LR, layer_decay=0.5, logit_scale_lr_ratio=2.0)
    assert learning_rates(optimizer) == pytest.approx(
        {"decayed": LR, "decayed_lowest": LR / 64, "plain": LR, "plain_lowest": LR / 64, "scales": 2 * LR}
    )
    assert main_learning_rate(optimizer) == LR
    warmup_constant(optimizer, warmup_steps=4)
    assert main_learning_rate(optimizer) == LR / 4
    muon = build_muon(module, lr=LR, matrix_lr=2 * LR, layer_decay=0.5)
    assert set(learning_rates(muon)) == {
        "matrices", "matrices_lowest", "decayed", "decayed_lowest", "plain", "plain_lowest", "scales",
    }  # fmt: skip
    trained = nn.ModuleDict({"model": copy.deepcopy(module["model"])}).requires_grad_(False)
    trained["model"].get_submodule("backbone").requires_grad_(True)
    assert main_learning_rate(build_optimizer(trained, lr=LR, layer_decay=0.5)) == pytest.approx(LR, rel=1e-15)


def test_frozen_layers_below_leave_the_rates_of_those_above(module: nn.ModuleDict) -> None:
    locked = copy.deepcopy(module)
    locked["model"].get_submodule("backbone.layers.0").requires_grad_(False)
    locked["model"].get_submodule("vl_encoder.layers.1").requires_grad_(False)
    made = rates(build_optimizer(locked, lr=LR, layer_decay=DECAY).param_groups)
    whole = rates(build_optimizer(module, lr=LR, layer_decay=DECAY).param_groups)
    assert made == {name: whole[name] for name in made}
    assert len(made) < len(whole)


def test_parameters_of_an_objective_learn_as_heads_do() -> None:
    ratio = rate_ratios(["model.backbone.layers.0.x", "objectives.itm.head.weight"], layer_decay=0.5)
    assert ratio("objectives.itm.head.weight") == 1


@pytest.mark.parametrize("build", [build_optimizer, lambda m, **k: build_muon(m, matrix_lr=LR, **k)])
def test_a_state_by_name_goes_on_as_one_that_was_never_written(build: Any) -> None:
    results = []
    for stops in (False, True):
        torch.manual_seed(0)
        model = M2Encoder(tiny_config())
        optimizer = build(model, lr=LR, layer_decay=0.5, image_lr_ratio=2.0)
        for step in range(4):
            if step == 2 and stops:
                saved = key_by_name(optimizer.state_dict())
                optimizer = build(model, lr=LR, layer_decay=0.5, image_lr_ratio=2.0)
                optimizer.load_state_dict(saved)
                assert learning_rates(optimizer)["decayed_lowest"] == LR / 8
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape)
            optimizer.step()
        results.append(model.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(UserError, match="needs the layers of an M2-Encoder") as error:
        build_optimizer(nn.Linear(2, 2), lr=LR, text_lr_ratio=0.5)
    assert error.value.key == "text_lr_ratio"
