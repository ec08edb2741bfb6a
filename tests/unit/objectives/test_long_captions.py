"""Long and short captions against the formula, with a plain InfoNCE and numpy's singular vectors, in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from m2_encoder.errors import UserError
from m2_encoder.objectives.contrastive import ImageTextContrastive
from m2_encoder.objectives.long_captions import LongCaptions, reduce_features
from tests.support.models import small_config
from tests.support.objectives import draw_inputs, leaves


def plain_reduction(features: Tensor, components: int) -> Tensor:
    mean = features.detach().numpy().mean(axis=0)
    directions = np.linalg.svd(features.detach().numpy() - mean)[2][:components]
    projection = torch.from_numpy(directions.T @ directions)
    return functional.normalize(torch.from_numpy(mean) + (features - torch.from_numpy(mean)) @ projection, dim=1)


def plain_contrast(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    logits = scale.exp() * images @ texts.t()
    own = torch.arange(len(images))
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.t(), own)) / 2


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_loss_and_gradients(share: float) -> None:
    inputs = draw_inputs(8, 2)
    output = LongCaptions(components=2, short_share=share, multi_positive=False)(inputs)
    images, texts, scale = leaves(inputs)
    long = plain_contrast(images, texts[0::2], scale)
    short = plain_contrast(plain_reduction(images, 2), texts[1::2], scale)
    expected = (1 - share) * long + share * short
    torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(output.per_sample.mean(), expected.detach(), rtol=1e-10, atol=0)
    ours = torch.autograd.grad(output.loss, leaves(inputs))
    for found, wanted in zip(ours, torch.autograd.grad(expected, leaves(inputs)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-12)


def test_two_languages_are_captions_of_one_image() -> None:
    """A long and a short one of each language: with all components left, the mean of two plain contrasts."""
    inputs = draw_inputs(5, 4)
    output = LongCaptions(components=5)(inputs)
    parts = []
    for first in range(2):
        pair = inputs.heads["features"]
        parts.append(
            ImageTextContrastive()(
                inputs._replace(heads={"features": pair._replace(text_features=pair.text_features[first::2])})
            )
        )
    torch.testing.assert_close(output.loss, torch.stack([part.loss for part in parts]).mean(), rtol=1e-9, atol=0)
    rows = torch.stack([part.per_sample for part in parts], dim=1).flatten()
    torch.testing.assert_close(output.per_sample, rows, rtol=1e-8, atol=0)


def test_equal_images_have_finite_gradients() -> None:
    """Eigenvalues that are equal, or 0, choose some directions; gradients do not pass through the choice."""
    features = functional.normalize(torch.ones(6, 5), dim=1).requires_grad_()
    reduced = reduce_features(features, features.detach(), components=3)
    (gradient,) = torch.autograd.grad(reduced.sum(), [features])
    assert torch.isfinite(gradient).all()
    torch.testing.assert_close(reduced, features)


def test_half_precision_is_reduced_in_full() -> None:
    features = functional.normalize(torch.randn(12, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reduced = reduce_features(features.bfloat16(), features.bfloat16(), components=3)
    assert reduced.dtype == torch.float32
    torch.testing.assert_close(reduced, reduce_features(features, features, components=3), atol=0.02, rtol=0)


def test_what_cannot_be_paired_or_reduced() -> None:
    with pytest.raises(UserError, match=r"there are 1 for each image; use data\.captions\.short=first_sentence"):
        LongCaptions()(draw_inputs(4, 1))
    with pytest.raises(UserError, match="must be below the 16 numbers of a feature") as caught:
        LongCaptions(components=16).build(small_config(feature_dim=16))
    assert caught.value.key == "components"
    for wrong in ({"components": 0}, {"short_share": 1.5}):
        with pytest.raises(UserError, match="must be"):
            LongCaptions(**wrong)  # type: ignore[arg-type]
