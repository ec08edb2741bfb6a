"""Low-rank updates: nothing at the start, exact when merged, and by an independent formula in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from m2_encoder.errors import UserError
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.training.adaptation import check_adaptation, merge_adaptation
from m2_encoder.training.adaptations.lora import Lora, LoraLinear
from tests.support.models import random_images, random_model, random_text, small_config

CONFIG = small_config()


def features_of(model: M2Encoder) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return torch.cat([model.encode_image(random_images(CONFIG, 3)), model.encode_text(random_text(CONFIG, [3, 9]))])


def adapted(**arguments: Any) -> tuple[M2Encoder, Lora]:
    torch.manual_seed(2)
    model, adaptation = random_model(CONFIG), Lora(**arguments)
    adaptation.apply(model)
    return model, adaptation


def disturb(model: M2Encoder) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.1)


@pytest.mark.parametrize("arguments", [{"rank": 0}, {}, {"rank": 16, "first_layer": 3}])
def test_it_begins_as_the_base_to_the_bit(arguments: dict[str, Any]) -> None:
    torch.manual_seed(2)
    base = random_model(CONFIG)
    model, adaptation = adapted(**arguments)
    assert torch.equal(features_of(model), features_of(base))
    merged = merge_adaptation(adaptation, model)
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in merged.state_dict().items())


@pytest.mark.parametrize("arguments", [{"rank": 4, "alpha": 8}, {"rank": 3, "alpha": 5, "modules": ["fc2", "q_proj"]}])
def test_merged_equals_unmerged(arguments: dict[str, Any]) -> None:
    model, adaptation = adapted(**arguments)
    before = features_of(model)
    disturb(model)
    unmerged = features_of(model)
    assert (unmerged - before).abs().max() > 0.01
    merged = merge_adaptation(adaptation, model)
    assert not any(isinstance(module, LoraLinear) for module in merged.modules())
    torch.testing.assert_close(features_of(merged), unmerged, rtol=0, atol=1e-6)


def test_a_layer_computes_the_formula() -> None:
    torch.manual_seed(0)
    base = torch.nn.Linear(5, 7)
    layer = LoraLinear(base, rank=2, scale=0.7, dropout=0.0).double()
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 5, dtype=torch.float64)
    w, b, down, up = (value.detach().numpy() for value in (layer.weight, layer.bias, layer.lora_A, layer.lora_B))
    expected = x.numpy() @ w.T + b + 0.7 * (x.numpy() @ down.T) @ up.T
    torch.testing.assert_close(layer(x), torch.from_numpy(expected))


def test_what_is_trained() -> None:
    model, _ = adapted(rank=2, first_layer=1, experts=["vision_expert"], also=["projections", "norms"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    updates = {name for name in trained if "lora_" in name}
    layers = {".".join(name.split(".")[:3]) for name in updates}
    assert layers == {"backbone.layers.1", "vl_encoder.layers.0", "vl_encoder.layers.1"}
    assert len(updates) == 3 * 6 * 2
    assert all(".vision_expert." in name for name in updates)
    others = trained - updates
    assert {"vl_text_proj.weight", "backbone.norm.text_expert.bias"} <= others
    assert "backbone.layers.0.vision_expert.ffn_norm.weight" in others
    assert not {"logit_scale", "norm.weight", "pooler.weight"} & others
    assert all("norm" in name or name.split(".")[0].endswith("_proj") for name in others)
    default, _ = adapted()
    whole = {name for name, p in default.named_parameters() if p.requires_grad and "lora_" not in name}
    assert whole == {"logit_scale", "logit_vl_scale"}


def test_layers_below_the_first_one_are_not_passed_backward() -> None:
    model, _ = adapted(rank=2, first_layer=1)
    kept: list[Tensor] = []
    model.backbone.layers[1].register_forward_pre_hook(lambda _module, inputs: kept.append(inputs[0]))
    model.train()
    model.encode_image(random_images(CONFIG, 2)).sum().backward()
    assert not kept[0].requires_grad


def test_dropout_is_of_training_alone() -> None:
    model, _ = adapted(rank=4, dropout=0.5)
    disturb(model)
    assert torch.equal(features_of(model), features_of(model.eval()))
    images = random_images(CONFIG, 2)
    model.train()
    assert not torch.equal(model.encode_image(images), model.encode_image(images))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rank": 17}, r"adaptation\.rank=17: must be at most 16, the width of the model"),
        ({"first_layer": 4}, r"adaptation\.first_layer=4: must be at most 3, the last layer of vl_encoder"),
        ({"first_layer": 2, "encoders": ["backbone"]}, r"first_layer=2: must be at most 1, the last layer of backbone"),
        ({"alpha": 0}, r"alpha=0: must be .*above 0"),
        ({"rank": -1}, r"rank=-1: must be "),
        ({"modules": ["qkv"]}, r"modules=\['qkv'\]: must be .*q_proj, k_proj, v_proj, out_proj, fc1, fc2"),
        ({"experts": ["audio_expert"]}, r"experts=\['audio_expert'\]: must be .*vision_expert, text_expert"),
        ({"encoders": []}, r"encoders=\[\]: must be "),
        ({"rank": 0, "also": []}, r"rank=0: must be above 0 where nothing else is trained"),
    ],
)
def test_what_cannot_be_updated(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_adaptation(Lora(**arguments), CONFIG)
