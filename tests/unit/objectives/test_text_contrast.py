"""Contrast within texts against its formula, caption by caption, in fp64, value and gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from m2_encoder.errors import UserError
from m2_encoder.objectives import text_contrast
from m2_encoder.objectives.base import ObjectiveInputs
from m2_encoder.objectives.text_contrast import TextContrast
from tests.support.objectives import draw_inputs, leaves

TEMPERATURE = 0.4


def plain_rows(inputs: ObjectiveInputs, *, hard: int | None, most: float) -> Tensor:
    """Loss of each caption."""
    texts, captions = inputs.text_features, len(inputs.text_features) // len(inputs.image_features)
    found = []
    for a in range(len(texts)):
        negatives = []
        for b in range(len(texts)):
            similarity = texts[a] @ texts[b]
            if inputs.identity[a // captions] != inputs.identity[b // captions] and float(similarity.detach()) <= most:
                negatives.append(similarity)
        negatives = sorted(negatives, key=lambda value: -value.item())[:hard]
        own = [b for b in range(len(texts)) if b // captions == a // captions and b != a]
        parts = [
            torch.log(1 + sum((torch.exp((n - texts[a] @ texts[p]) / TEMPERATURE) for n in negatives), torch.zeros(())))
            for p in own
        ]
        found.append(torch.stack(parts).mean())
    return torch.stack(found)


@pytest.mark.parametrize("captions", [2, 3])
@pytest.mark.parametrize(("hard", "most"), [(None, 1.0), (None, 0.5), (2, 0.8), (100, 1.0)])
def test_losses_and_gradients(captions: int, hard: int | None, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_contrast, "_TILE_BYTES", 5 * 8 * 6 * captions)  # five captions a tile
    inputs = draw_inputs(6, captions)
    output = TextContrast(temperature=TEMPERATURE, hard_negatives=hard, max_similarity=most)(inputs)
    expected = plain_rows(inputs, hard=hard, most=most)
    torch.testing.assert_close(output.loss, expected.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(output.per_sample, expected.detach(), rtol=1e-12, atol=1e-15)
    ours = torch.autograd.grad(output.loss, leaves(inputs))
    (wanted,) = torch.autograd.grad(expected.mean(), [inputs.text_features])
    torch.testing.assert_close(ours[1], wanted, rtol=1e-10, atol=1e-14)
    assert wanted.abs().max() > 1e-3
    assert not ours[0].any()
    assert not ours[2].any()


def test_captions_without_negatives_lose_nothing() -> None:
    inputs = draw_inputs(4, 2)
    inputs = inputs._replace(identity=torch.tensor([3, 3, 3, 3]))
    output = TextContrast()(inputs)
    assert output.loss.item() == 0
    assert all(not part.any() for part in torch.autograd.grad(output.loss, leaves(inputs)))
    mixed = TextContrast(max_similarity=-0.2)(draw_inputs(4, 2))
    assert mixed.loss.isfinite()
    assert (mixed.per_sample == 0).any(), "no caption was left without negatives: nothing was tested"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"hard_negatives": 0}, "hard_negatives=0: must be a whole number, 1 or more, or null"),
        ({"max_similarity": -1.0}, "max_similarity=-1.0"),
        ({"max_similarity": math.nan}, "max_similarity=nan"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TextContrast(**options)


def test_one_caption_each_is_refused() -> None:
    with pytest.raises(UserError, match=r"one each; use data\.captions\.every_language=true"):
        TextContrast()(draw_inputs(4, 1))
