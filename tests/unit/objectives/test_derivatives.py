"""Derivatives that a loss does not have are refused, never 0; so is a scale that was exponentiated already."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from m2_encoder.errors import UserError
from m2_encoder.models.token_prediction import token_cross_entropy
from m2_encoder.objectives import image_text_contrastive
from m2_encoder.objectives.alignment import mean_alignment
from m2_encoder.objectives.sigmoid import sigmoid_losses

IMAGES, TEXTS = (functional.normalize(torch.eye(4) + 0.1 * torch.arange(16.0).reshape(4, 4) * k, dim=1) for k in (1, 2))
SCALE = torch.tensor(2.5)


def contrast(images: Tensor, scale: Tensor) -> Tensor:
    return image_text_contrastive(images, TEXTS, scale)


def sigmoid(images: Tensor, scale: Tensor) -> Tensor:
    return sigmoid_losses(images, TEXTS, scale, torch.tensor(-1.0)).loss


def alignment(images: Tensor, scale: Tensor) -> Tensor:
    del scale
    return mean_alignment(images, TEXTS, TEXTS, lambda rows: torch.eye(4)[rows], group=None).mean


# Of torch itself, when forward mode is used for the first time.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")

LOSSES = [contrast, sigmoid, alignment]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("of", ["images", "scale"])
def test_forward_mode_is_refused(loss: Callable[[Tensor, Tensor], Tensor], of: str) -> None:
    if of == "scale" and loss is alignment:
        pytest.skip("has no scale")

    def run(given: Tensor) -> Tensor:
        return loss(given, SCALE) if of == "images" else loss(IMAGES, given)

    given = IMAGES if of == "images" else SCALE
    with pytest.raises(UserError, match="no forward-mode derivative"):
        torch.func.jvp(run, (given,), (torch.ones_like(given),))
    with pytest.raises(UserError, match="no forward-mode derivative"):
        torch.func.jacfwd(run)(given)
    with forward_ad.dual_level(), pytest.raises(UserError, match="no forward-mode derivative"):
        run(forward_ad.make_dual(given, torch.ones_like(given)))
    assert run(given).isfinite(), "without tangents it is what it was"


@pytest.mark.parametrize("loss", LOSSES)
def test_a_second_derivative_is_refused_or_fails(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    images = IMAGES.clone().requires_grad_()

    def penalise() -> None:
        (grad,) = torch.autograd.grad(loss(images, SCALE), images, create_graph=True)
        (images.sum() + grad.square().sum()).backward()

    with pytest.raises((UserError, RuntimeError)):
        penalise()
    (grad,) = torch.autograd.grad(loss(images, SCALE), images)
    assert grad.isfinite().all()


def test_forward_mode_of_the_loss_of_tokens_is_refused() -> None:
    table, bias, targets = torch.ones(5, 4), torch.zeros(5), torch.tensor([0, 1, 2, 3])

    def run(states: Tensor) -> Tensor:
        return token_cross_entropy(states, table, bias, targets)[0].sum()

    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        run(forward_ad.make_dual(IMAGES, torch.ones_like(IMAGES)))


@pytest.mark.parametrize("loss", [contrast, sigmoid])
@pytest.mark.parametrize("scale", [10.0, 14.3, 100.0])
def test_an_exponential_in_place_of_a_log_is_noticed(loss: Callable[[Tensor, Tensor], Tensor], scale: float) -> None:
    with pytest.raises(UserError, match=rf"logit_scale={scale:.4g} must be at most 9\.903: it is the log"):
        loss(IMAGES, torch.tensor(scale))
    for value in (-3.0, 0.0, math.log(100), math.log(1e4)):
        assert loss(IMAGES, torch.tensor(value)).isfinite()


@pytest.mark.parametrize("loss", [contrast, sigmoid])
@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan])
def test_a_scale_that_is_not_finite_is_named(loss: Callable[[Tensor, Tensor], Tensor], scale: float) -> None:
    with pytest.raises(UserError, match=rf"logit_scale={scale} must be finite.* not its exp\(\)"):
        loss(IMAGES, torch.tensor(scale))


def test_a_scale_on_two_heads() -> None:
    with pytest.raises(UserError, match=r"logit_scale=14\.3"):
        image_text_contrastive([IMAGES, IMAGES], [TEXTS, TEXTS], [SCALE, torch.tensor(14.3)])
