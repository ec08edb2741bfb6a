"""Softened targets against explicit matrices, in fp64, value and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from m2_encoder.errors import UserError
from m2_encoder.objectives import alignment, soft_targets
from m2_encoder.objectives.base import ObjectiveInputs
from m2_encoder.objectives.contrastive import ImageTextContrastive
from m2_encoder.objectives.soft_targets import SoftTargetContrastive
from tests.support.objectives import draw_inputs, leaves

TEMPERATURE = 0.3


def plain_loss(inputs: ObjectiveInputs, *, softness: float, source: str) -> Tensor:
    """Whole matrices; targets of images over texts and the other way round, element by element."""
    images, texts, scale = inputs.image_features, inputs.text_features, inputs.logit_scale.exp()
    count, captions = len(images), len(texts) // len(images)
    share = torch.zeros(count, count, dtype=torch.float64)
    with torch.no_grad():
        for i in range(count):
            same = [m for m in range(count) if inputs.identity[m] == inputs.identity[i]]
            seen = torch.stack([images[i] @ images[m] for m in range(count)]) / TEMPERATURE
            read = torch.zeros(count, dtype=torch.float64)
            for m in range(count):
                pairs = [
                    texts[i * captions + a] @ texts[m * captions + b] for a in range(captions) for b in range(captions)
                ]
                read[m] = torch.stack(pairs).mean() / TEMPERATURE
            soft = {
                "image": seen.softmax(0),
                "text": read.softmax(0),
                "both": (seen.softmax(0) + read.softmax(0)) / 2,
                "uniform": torch.full((count,), 1 / count, dtype=torch.float64),
            }[source]
            for m in range(count):
                share[i, m] = (1 - softness) * (m in same) / len(same) + softness * soft[m]
    logits = scale * images @ texts.t()
    wide = torch.stack([share[:, j // captions] / captions for j in range(count * captions)], dim=1)
    tall = torch.stack([share[j // captions] for j in range(count * captions)])
    assert torch.allclose(wide.sum(dim=1), torch.ones(count, dtype=torch.float64))
    return (functional.cross_entropy(logits, wide) + functional.cross_entropy(logits.t(), tall)) / 2


@pytest.mark.parametrize("captions", [1, 2])
@pytest.mark.parametrize("source", ["image", "text", "both", "uniform"])
def test_losses_and_gradients(source: Any, captions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "_TILE_BYTES", 4 * 8 * 6)  # four images a tile
    inputs = draw_inputs(6, captions)
    output = SoftTargetContrastive(softness=0.4, source=source, temperature=TEMPERATURE)(inputs)
    expected = plain_loss(inputs, softness=0.4, source=source)
    torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(output.per_sample.mean(), expected.detach(), rtol=1e-12, atol=0)
    ours = torch.autograd.grad(output.loss, leaves(inputs))
    for own, theirs in zip(ours, torch.autograd.grad(expected, leaves(inputs)), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-10, atol=1e-14)
        assert own.abs().max() > 1e-3


@pytest.mark.parametrize("multi_positive", [True, False])
def test_without_softness_it_is_itc(multi_positive: bool) -> None:
    inputs = draw_inputs(7, 2)
    ours = SoftTargetContrastive(softness=0.0, multi_positive=multi_positive)(inputs)
    theirs = ImageTextContrastive(multi_positive=multi_positive)(inputs)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.per_sample, theirs.per_sample, rtol=1e-12, atol=1e-14)


def test_softness_grows_with_the_steps() -> None:
    inputs = draw_inputs(6, 1)
    growing = SoftTargetContrastive(softness=[[0, 0.0], [10, 0.4]], source="image")
    for step, softness in ((0, 0.0), (5, 0.2), (10, 0.4), (99, 0.4)):
        fixed = SoftTargetContrastive(softness=softness, source="image")
        assert growing(inputs._replace(step=step)).loss.item() == fixed(inputs).loss.item()


def test_a_tile_is_made_once_and_never_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment, "_TILE_BYTES", 16 * 64 * 8)
    made: list[tuple[int, ...]] = []
    shares = soft_targets._Shares.__call__

    def counted(self: Any, some: slice) -> Tensor:
        tile = shares(self, some)
        made.append(tuple(tile.shape))
        return tile

    monkeypatch.setattr(soft_targets._Shares, "__call__", counted)
    SoftTargetContrastive()(draw_inputs(64, 2)).loss.backward()
    assert made == [(16, 64)] * 8  # four tiles for either direction, none for backward


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softness": 1.0}, r"softness=1.0: must be"),
        ({"softness": []}, "softness="),
        ({"softness": [[0, 1.0]]}, r"must be in \[0, 1\)"),
        ({"softness": [[0, -0.1]]}, "softness="),
        ({"softness": [["x", 0.1]]}, "softness="),
        ({"source": "teacher"}, "source=teacher: must be one of image, text, both, uniform"),
        ({"temperature": 0.0}, "temperature=0.0: must be a number, 0.0001 or more"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SoftTargetContrastive(**options)
