"""SigLIP against its formula on the whole logit matrix, in fp64, value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from m2_encoder.errors import UserError
from m2_encoder.objectives import sigmoid
from m2_encoder.objectives.base import ObjectiveInputs
from m2_encoder.objectives.sigmoid import SigmoidContrastive, sigmoid_losses
from tests.support.objectives import draw_inputs, leaves


def plain_rows(inputs: ObjectiveInputs, bias: Tensor, *, multi_positive: bool) -> Tensor:
    """Loss of each text: the published sum, pair by pair."""
    captions = len(inputs.text_features) // len(inputs.image_features)
    rows = []
    for j, text in enumerate(inputs.text_features):
        total = torch.zeros((), dtype=torch.float64)
        for i, image in enumerate(inputs.image_features):
            same = i == j // captions or (multi_positive and bool(inputs.identity[i] == inputs.identity[j // captions]))
            logit = inputs.logit_scale.exp() * (image @ text) + bias
            total = total - torch.log(torch.sigmoid(logit if same else -logit))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("captions", [1, 2])
@pytest.mark.parametrize("multi_positive", [True, False])
def test_losses_and_gradients(captions: int, multi_positive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sigmoid, "_TILE_ROWS", 3)
    monkeypatch.setattr(sigmoid, "_TILE_COLUMNS", 4)
    inputs = draw_inputs(7, captions)
    objective = SigmoidContrastive(initial_bias=-1.5, multi_positive=multi_positive).double()
    output = objective(inputs)
    expected = plain_rows(inputs, objective.logit_bias, multi_positive=multi_positive)
    torch.testing.assert_close(output.loss, expected.mean(), rtol=1e-13, atol=0)
    torch.testing.assert_close(output.per_sample, expected.detach(), rtol=1e-13, atol=0)
    wanted = [*leaves(inputs), objective.logit_bias]
    ours = torch.autograd.grad(3 * output.loss, wanted)
    for own, theirs in zip(ours, torch.autograd.grad(3 * expected.mean(), wanted), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-11, atol=1e-15)
        assert own.abs().max() > 1e-3


def test_no_gradient_is_computed_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw_inputs(4, 1)
    with torch.no_grad():
        loss = SigmoidContrastive().double()(inputs).loss
    assert not loss.requires_grad
    torch.testing.assert_close(loss, SigmoidContrastive().double()(inputs).loss.detach())


def test_extreme_logits_and_half_precision() -> None:
    inputs = draw_inputs(6, 1)
    images, texts = (side.detach().to(torch.bfloat16).requires_grad_() for side in leaves(inputs)[:2])
    losses = sigmoid_losses(images, texts, torch.tensor(9.0), torch.tensor(-10.0))
    assert losses.loss.dtype == torch.float32
    losses.loss.backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert losses.per_sample.isfinite().all()
    precise = sigmoid_losses(images.detach().double(), texts.detach().double(), torch.tensor(9.0), torch.tensor(-10.0))
    torch.testing.assert_close(losses.loss.double(), precise.loss, rtol=1e-5, atol=0)


def test_the_start_is_nearly_right_about_wrong_pairs() -> None:
    """With b = -10 the loss of a first step is that of the positives, not of M times as many negatives."""
    inputs = draw_inputs(64, 1, width=64)
    loss = float(SigmoidContrastive(multi_positive=False)(inputs).loss.detach())
    assert 5 < loss < 12


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(UserError, match=r"\(3, 4\) and text_features \(4, 4\)"):
        sigmoid_losses(torch.ones(3, 4), torch.ones(4, 4), torch.tensor(1.0), torch.tensor(0.0))
    with pytest.raises(UserError, match="initial_bias=nan"):
        SigmoidContrastive(initial_bias=float("nan"))
