from __future__ import annotations

from typing import Any

import pytest
import torch

from m2_encoder.errors import UserError
from m2_encoder.objectives.attentive import attentive_mask


def _features() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(5, 9, 8, generator=generator), torch.randn(5, 8, generator=generator)


@pytest.mark.parametrize("mode", ["high", "low"])
def test_attentive_mask_hides_one_end(mode: Any) -> None:
    patches, text = _features()
    mask = attentive_mask(patches, text, count=4, mode=mode)
    for row in range(5):
        similarity = [float(torch.dot(patch / patch.norm(), text[row] / text[row].norm())) for patch in patches[row]]
        order = sorted(range(9), key=similarity.__getitem__, reverse=mode == "high")
        assert {index for index in range(9) if bool(mask[row, index])} == set(order[:4])


def test_both_ends_are_each_others_rest() -> None:
    patches, text = _features()
    high = attentive_mask(patches, text, count=4)
    assert torch.equal(~high, attentive_mask(patches, text, count=5, mode="low"))
    assert torch.equal(high, attentive_mask(patches * 7, text * 0.1, count=4))


def test_noise_varies_the_mask_by_its_generator_alone() -> None:
    patches, text = _features()

    def draw(seed: int, noise: float) -> torch.Tensor:
        return attentive_mask(patches, text, count=4, noise=noise, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1, 0.5), draw(1, 0.5))
    assert not torch.equal(draw(1, 0.5), draw(2, 0.5))
    assert torch.equal(draw(1, 1e-6), attentive_mask(patches, text, count=4))
    assert bool((draw(1, 5.0).sum(dim=1) == 4).all())


def test_ties_still_hide_as_many() -> None:
    mask = attentive_mask(torch.ones(2, 9, 4, dtype=torch.bfloat16), torch.ones(2, 4, dtype=torch.bfloat16), count=3)
    assert mask.sum(dim=1).tolist() == [3, 3]


def test_choice_has_no_gradient() -> None:
    patches, text = _features()
    assert not attentive_mask(patches.requires_grad_(), text, count=4).requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 9}, "count=9"),
        ({"count": 0}, "count=0"),
        ({"mode": "middle"}, "'middle'"),
        ({"noise": -1.0}, "noise=-1.0"),
        ({"text_feature": torch.ones(4, 8)}, r"\(4, 8\)"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    patches, text = _features()
    with pytest.raises(UserError, match=message):
        attentive_mask(**{"patch_features": patches, "text_feature": text, "count": 4, **changes})
