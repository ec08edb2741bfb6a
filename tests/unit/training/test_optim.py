"""Parameter groups, the optimizer and the schedules."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from m2_encoder.errors import UserError
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.trainable_parts import OPTIONAL_PARTS
from m2_encoder.objectives.sigmoid import SigmoidContrastive
from m2_encoder.training.optim import (
    build_optimizer,
    fill_state,
    key_by_name,
    parameter_groups,
    warmup_constant,
    warmup_cosine,
)
from tests.support.training import tiny_config

EXPERT_MATRICES = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@pytest.fixture(scope="module")
def model() -> M2Encoder:
    return M2Encoder(tiny_config())


def decayed_names() -> set[str]:
    """Written out: the matrices and convolutions of the smallest model, nothing computed from shapes."""
    names = {
        "image_embed.proj.weight",
        "text_embed.tokens.weight",
        "pooler.weight",
        "text_proj.weight",
        "image_proj.weight",
        "vl_text_proj.weight",
        "vl_image_proj.weight",
    }
    for encoder in ("backbone", "vl_encoder"):
        for expert in ("vision_expert", "text_expert"):
            names |= {f"{encoder}.layers.0.{expert}.{matrix}.weight" for matrix in EXPERT_MATRICES}
    return names


def groups_of(module: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    return parameter_groups(module.named_parameters(), lr=1e-3, weight_decay=weight_decay, logit_scale_lr_ratio=20)


def test_the_scales_have_their_own_learning_rate(model: M2Encoder) -> None:
    assert [group["lr"] for group in groups_of(model, weight_decay=0.1)] == pytest.approx([1e-3, 1e-3, 2e-2])


def test_the_bias_of_sigmoid_losses_goes_with_the_scale_that_it_follows(model: M2Encoder) -> None:
    module = nn.ModuleDict({"model": model, "objectives": nn.ModuleDict({"sigmoid": SigmoidContrastive()})})
    decayed, plain, scales = groups_of(module, weight_decay=0.1)
    assert "objectives.sigmoid.logit_bias" in scales["names"]
    assert (scales["lr"], scales["weight_decay"]) == (pytest.approx(2e-2), 0.0)
    assert not [name for name in (*decayed["names"], *plain["names"]) if "logit" in name]


def test_exactly_the_matrices_and_convolutions_are_decayed(model: M2Encoder) -> None:
    decayed, plain, scales = groups_of(model, weight_decay=0.3)
    assert [group["weight_decay"] for group in (decayed, plain, scales)] == [0.3, 0.0, 0.0]
    assert set(scales["names"]) == {"logit_scale", "logit_vl_scale"}
    assert set(decayed["names"]) == decayed_names()
    kept = {*plain["names"], *scales["names"]}
    for name in (
        "logit_scale", "logit_vl_scale", "image_embed.cls_token", "image_embed.mask_token",
        "image_embed.positions.weight", "text_embed.positions.weight", "image_embed.proj.bias", "norm.weight",
        "backbone.layers.0.vision_expert.attention_inner_norm.weight", "vl_encoder.layers.0.text_expert.fc1.bias",
    ):  # fmt: skip
        assert name in kept, name


def test_every_parameter_is_in_exactly_one_group_under_its_name(model: M2Encoder) -> None:
    groups = groups_of(model, weight_decay=0.1)
    placed = [(name, p) for group in groups for name, p in zip(group["names"], group["params"], strict=True)]
    own = dict(model.named_parameters())
    assert len(placed) == len(own)
    assert {name: id(p) for name, p in placed} == {name: id(p) for name, p in own.items()}


def test_frozen_parameters_are_left_out() -> None:
    model = M2Encoder(tiny_config())
    frozen = model.freeze_parts(OPTIONAL_PARTS)
    names = {name for group in groups_of(model, weight_decay=0.1) for name in group["names"]}
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not names & {"pooler.weight", "norm.weight", "logit_vl_scale", "image_embed.mask_token"}
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == frozen > 0


def test_names_with_prefixes_of_wrappers_are_told_apart_all_the_same() -> None:
    wrapped = nn.ModuleDict({"model": M2Encoder(tiny_config())})
    decayed, *_ = groups_of(wrapped, weight_decay=0.1)
    assert set(decayed["names"]) == {f"model.{name}" for name in decayed_names()}


def test_the_optimizer_takes_its_arguments(model: M2Encoder) -> None:
    optimizer = build_optimizer(model, lr=3e-4, betas=[0.8, 0.9], eps=1e-7, weight_decay=0.05)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.9), 1e-7)


def test_one_group_is_enough() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2, bias=False), lr=1.0)
    assert len(optimizer.param_groups) == 1


def test_a_filled_state_goes_on_as_one_that_was_never_written() -> None:
    """Whatever has had a gradient before, a scalar or a matrix."""
    for late in ("matrix", "scale", "bias"):
        results = []
        for fills in (False, True):
            torch.manual_seed(0)
            values = {"matrix": torch.randn(3, 2), "scale": torch.randn(()), "bias": torch.randn(4)}
            module = nn.ParameterDict({name: nn.Parameter(value) for name, value in values.items()})
            optimizer = build_optimizer(module, lr=0.1)
            for step in range(4):
                if step == 2 and fills:
                    filled = fill_state(key_by_name(optimizer.state_dict()), module.state_dict())
                    assert filled["state"][late]["exp_avg"].shape == module[late].shape
                    optimizer = build_optimizer(module, lr=0.1)
                    optimizer.load_state_dict(filled)
                for name, parameter in module.items():
                    parameter.grad = torch.randn(parameter.shape) if name != late or step > 2 else None
                optimizer.step()
            results.append({name: value.clone() for name, value in module.state_dict().items()})
        for name, value in results[0].items():
            assert torch.equal(value, results[1][name]), (late, name)


@pytest.mark.parametrize("state", [{}, {"muon": {}, "adamw": {}}, {"state": {}, "param_groups": [{"params": ["a"]}]}])
def test_a_state_of_nobody_stays_as_it_is(state: dict[str, Any]) -> None:
    assert fill_state(state, {"a": torch.ones(2)}) is state


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(UserError, match="nothing to train"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), lr=1.0)


def rates(build: object, steps: int) -> list[float]:
    """The learning rate of each step, as the optimizer sees it; its peak is 2."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=2.0)
    scheduler = build(optimizer)  # type: ignore[operator]
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_values_of_warm_up_and_cosine() -> None:
    seen = rates(lambda o: warmup_cosine(o, warmup_steps=4, max_steps=12), 14)
    expected = [0.5, 1.0, 1.5, 2.0] + [1 + math.cos(math.pi * t / 8) for t in range(8)] + [0.0, 0.0]
    assert seen == pytest.approx(expected)


def test_the_floor_of_the_cosine() -> None:
    seen = rates(lambda o: warmup_cosine(o, warmup_steps=0, max_steps=10, min_lr_ratio=0.1), 13)
    assert seen[0] == 2.0
    assert seen[5] == pytest.approx(2 * 0.55)
    assert seen[10:] == pytest.approx([0.2] * 3)


@given(warmup=st.integers(0, 30), more=st.integers(1, 60), floor=st.floats(0, 1))
def test_the_schedule_never_leaves_its_bounds_nor_rises_after_the_peak(warmup: int, more: int, floor: float) -> None:
    seen = rates(
        lambda o: warmup_cosine(o, warmup_steps=warmup, max_steps=warmup + more, min_lr_ratio=floor), warmup + more + 3
    )
    assert all(0 <= rate <= 2.0000001 for rate in seen)
    assert seen[:warmup] == sorted(seen[:warmup])
    after = seen[max(0, warmup - 1) :]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(after))
    assert seen[-1] == pytest.approx(2 * floor)
    assert seen[0] > 0, "the first step must not be wasted"


def test_warm_up_and_then_constant() -> None:
    assert rates(lambda o: warmup_constant(o, warmup_steps=4), 6) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert rates(lambda o: warmup_constant(o, warmup_steps=0), 2) == [2.0, 2.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_steps": -1, "max_steps": 5}, "warmup_steps=-1"),
        ({"warmup_steps": 6, "max_steps": 5}, "warmup_steps=6: must be in 0..max_steps=5"),
        ({"warmup_steps": 1, "max_steps": 5, "min_lr_ratio": 1.5}, "min_lr_ratio=1.5"),
        ({"warmup_steps": 1, "max_steps": 5, "min_lr_ratio": -0.1}, "min_lr_ratio=-0.1"),
    ],
)
def test_impossible_schedules_are_named(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rates(lambda o: warmup_cosine(o, **arguments), 1)  # type: ignore[arg-type]


def test_an_impossible_constant_schedule_is_named() -> None:
    with pytest.raises(UserError, match="warmup_steps=-2"):
        rates(lambda o: warmup_constant(o, warmup_steps=-2), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"betas": [0.9]}, r"betas=\[0.9\]: must be 2 numbers"),
        ({"betas": [0.9, 1.0]}, r"betas=\[0.9, 1.0\]"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"eps": -1e-9}, "eps=-1e-09"),
    ],
)
def test_impossible_arguments_of_the_optimizer_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_optimizer(nn.Linear(2, 2), **{"lr": 1e-3, **arguments})  # type: ignore[arg-type]
