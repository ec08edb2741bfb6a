"""Muon against its definition and against torch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.training.muon import Muon, MuonWithAdamW, orthogonalize
from m2_encoder.training.optim import build_muon, build_optimizer, is_hidden_matrix, warmup_cosine
from tests.support.training import tiny_config


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 32), (2, 32, 8)])
def test_orthogonalize_keeps_singular_vectors_and_levels_singular_values(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    levelled = u.mT @ orthogonalize(x) @ vh.mT
    values = levelled.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.5
    assert values.max() < 1.3
    off_diagonal = levelled - torch.diag_embed(values)
    assert off_diagonal.abs().max() < 2e-3


def test_each_matrix_is_orthogonalized_on_its_own() -> None:
    x = torch.randn(4, 6, 9)
    torch.testing.assert_close(orthogonalize(x)[2:3], orthogonalize(x[2:3]))
    torch.testing.assert_close(orthogonalize(100 * x), orthogonalize(x), rtol=1e-3, atol=1e-3)


def test_it_is_the_rule_of_torch() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in [(12, 12), (48, 12), (12, 48), (12, 12)]]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    a = Muon(ours, lr=0.02, momentum=0.9, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True, adjust_lr_fn="match_rms_adamw")
    for _ in range(6):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    # torch iterates in bfloat16: three digits of each update
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).norm() / q.norm() < 2e-3


def test_only_matrices() -> None:
    with pytest.raises(ValueError, match="matrices"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)


def build(model: M2Encoder) -> MuonWithAdamW:
    return build_muon(model, lr=1e-3, matrix_lr=2e-3, weight_decay=0.1, logit_scale_lr_ratio=5)


def fill_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_every_parameter_has_one_home_and_layers_matrices_are_muons() -> None:
    model = M2Encoder(tiny_config())
    optimizer = build(model)
    placed = [name for group in optimizer.param_groups for name in group["names"]]
    assert sorted(placed) == sorted(name for name, _ in model.named_parameters())
    muon = set(optimizer.param_groups[0]["names"])
    assert muon == {name for name, p in model.named_parameters() if is_hidden_matrix(name, p)}
    assert "backbone.layers.0.vision_expert.fc1.weight" in muon
    assert not any(name.startswith(("text_embed", "image_embed", "vl_image_proj", "pooler")) for name in muon)


def test_the_others_are_updated_as_by_adamw() -> None:
    torch.manual_seed(0)
    model = M2Encoder(tiny_config())
    twin = copy.deepcopy(model)
    a, b = build(model), build_optimizer(twin, lr=1e-3, weight_decay=0.1, logit_scale_lr_ratio=5)
    for step in range(3):
        fill_gradients(model, step)
        fill_gradients(twin, step)
        a.step()
        b.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q) != is_hidden_matrix(name, p), name


def test_a_schedule_reaches_both_parts_and_a_missing_gradient_is_left_alone() -> None:
    model = M2Encoder(tiny_config())
    optimizer = build(model)
    warmup_cosine(optimizer, warmup_steps=4, max_steps=10)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_state_survives_a_round_trip() -> None:
    torch.manual_seed(0)
    model = M2Encoder(tiny_config())
    optimizer = build(model)
    for step in range(2):
        fill_gradients(model, step)
        optimizer.step()
    twin = copy.deepcopy(model)
    restored = build(twin)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    warmup_cosine(restored, warmup_steps=1, max_steps=10)
    warmup_cosine(optimizer, warmup_steps=1, max_steps=10)
    for both, one in ((model, optimizer), (twin, restored)):
        fill_gradients(both, 7)
        one.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name
