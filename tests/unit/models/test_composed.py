"""Two towers of modules: what is locked stays, what is cached is the same, and it trains as somebody else's model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m2_encoder.errors import UserError
from m2_encoder.models.composed import ComposedTowers


class Eyes(nn.Module):
    """Convolution, batch norm and dropout, which do other things in training."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.BatchNorm2d(6), nn.Dropout(0.5))
        self.seen = 0

    def forward(self, pixels: Tensor) -> Tensor:
        self.seen += len(pixels)
        found: Tensor = self.layers(pixels)
        return found


class Words(nn.Module):
    """The mean of the tokens that the mask shows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        weights = mask.float() / mask.sum(dim=1, keepdim=True)
        found: Tensor = (self.table(ids) * weights[..., None]).sum(dim=1)
        return found


def _towers(**more: Any) -> ComposedTowers:
    torch.manual_seed(0)
    return ComposedTowers(image=Eyes(), text=Words(), image_size=8, vocab_size=20, feature_dim=7, **more)


def _batch(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    return (
        torch.rand(4, 3, 8, 8),
        torch.randint(0, 20, (4, 6)),
        torch.arange(6)[None] < torch.tensor([[6], [3], [1], [4]]),
    )


def test_what_is_locked_does_not_move_by_a_bit() -> None:
    towers = _towers()
    towers.train()
    before = {name: value.clone() for name, value in towers.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in towers.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    images, ids, mask = _batch()
    for _ in range(3):
        loss = (towers.encode_image(images) * towers.encode_text(ids, mask)).sum() * towers.logit_scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = {name for name, value in towers.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith("image.") for name in moved), "batch norm counts nothing either"
    assert {"image_proj.weight", "text_proj.weight", "text.table.weight", "logit_scale"} <= moved
    assert towers.text.training
    assert not towers.image.training


def test_features_are_those_of_the_parts() -> None:
    towers = _towers(locked=[]).eval()
    images, ids, mask = _batch()
    pixels = towers.image.layers[:2](images).mean(dim=(2, 3))  # type: ignore[index,operator]
    torch.testing.assert_close(towers.encode_image(images), towers.image_proj(pixels))
    alone = torch.stack([towers.text.table(row[keep]).mean(dim=0) for row, keep in zip(ids, mask, strict=True)])  # type: ignore[operator]
    torch.testing.assert_close(towers.encode_text(ids, mask), towers.text_proj(alone))


def test_cached_rows_are_computed_once_and_the_same() -> None:
    plain, cached = _towers(), _towers(cached_rows=6)
    images, _, _ = _batch()
    before = cached.image.seen
    for rows in ([0, 1, 2, 3], [3, 1, 1], [2, 0, 3]):
        torch.testing.assert_close(cached.encode_image(images[rows]), plain.encode_image(images[rows]))
    assert cached.image.seen == before + 4
    other, _, _ = _batch(seed=9)
    torch.testing.assert_close(cached.encode_image(other), plain.encode_image(other))
    assert len(cached._kept["image"]) == 6, "the oldest are dropped"
    assert cached.encode_image(images).requires_grad, "the projection is trained"


def test_captions_are_found_again_however_they_are_padded() -> None:
    plain, cached = _towers(locked=["text"]), _towers(locked=["text"], cached_rows=9)
    _, ids, mask = _batch()
    wide = torch.nn.functional.pad(ids, (0, 3), value=7), torch.nn.functional.pad(mask, (0, 3))
    for given in ((ids, mask), wide):
        torch.testing.assert_close(cached.encode_text(*given), plain.encode_text(*given))
    assert len(cached._kept["text"]) == len(ids)


def test_layers_of_the_projections() -> None:
    images, ids, mask = _batch()
    torch.manual_seed(0)
    parts: dict[str, Any] = {"image": Eyes(), "text": Words(), "image_size": 8, "vocab_size": 20}
    towers = ComposedTowers(**parts, image_layers=0, text_layers=2, temperature=0.02).eval()
    torch.testing.assert_close(towers.encode_image(images), towers.image(images).mean(dim=(2, 3)))
    first, second = towers.text_proj[0], towers.text_proj[2]  # type: ignore[index]
    hidden = torch.nn.functional.gelu(first(towers.text(ids, mask)))
    torch.testing.assert_close(towers.encode_text(ids, mask), second(hidden))
    assert towers.encode_text(ids, mask).shape == (4, 6)
    torch.testing.assert_close(towers.logit_scale.exp(), torch.tensor(50.0))
    with pytest.raises(
        UserError, match="image_layers=0: leaves features of 6 numbers as they are, where feature_dim=7"
    ):
        ComposedTowers(**parts, feature_dim=7, image_layers=0)
    with pytest.raises(UserError, match="feature_dim: must be a number where both modules have a projection"):
        ComposedTowers(**parts)
    with pytest.raises(UserError, match="text_layers=3: must be one of 0, 1, 2"):
        ComposedTowers(**parts, feature_dim=7, text_layers=3)


def test_a_module_that_gives_no_rows_is_refused() -> None:
    class Odd(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return pixels.flatten(1)[None]

    with pytest.raises(UserError, match=r"image=Odd: gives \(1, 1, 192\) for one item; it must give \(1, D\)"):
        ComposedTowers(image=Odd(), text=Words(), image_size=8, vocab_size=20)
