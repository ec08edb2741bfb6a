"""Somebody else's model of two towers, in the place of an encoder."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m2_encoder.errors import UserError
from m2_encoder.models.two_towers import TowersConfig, TwoTowers
from m2_encoder.tokenizers.foreign import ForeignTokenizer
from m2_encoder.types import TextTokens

CONFIG = TowersConfig(name="mine.Towers", image_size=8, context_length=6)
TEXT = TextTokens(torch.tensor([[1, 2, 9], [3, 9, 9]]), torch.tensor([[True, True, True], [True, True, False]]))


class Towers(nn.Module):
    """The least that is one."""

    def __init__(self, *, width: int = 5, text_width: int = 5, scale: Tensor | None = None) -> None:
        super().__init__()
        self.image = nn.Linear(3 * 8 * 8, width)
        self.words = nn.Embedding(10, text_width)
        self.unused = nn.Linear(2, 2)
        if scale is not None:
            self.logit_scale = nn.Parameter(scale)

    def encode_image(self, images: Tensor) -> Any:
        return self.image(images.flatten(1))

    def encode_text(self, ids: Tensor) -> Any:
        return self.words(ids).sum(dim=1)


class Masked(Towers):
    """Its text encoder takes a mask."""

    def encode_text(self, ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        assert attention_mask is not None
        return (self.words(ids) * attention_mask[..., None]).sum(dim=1)


class Mixed(Towers):
    """Mixes the rows of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)

    def encode_image(self, images: Tensor) -> Any:
        return self.norm(super().encode_image(images))


class Wrapped(Towers):
    """Gives more than features."""

    def encode_image(self, images: Tensor) -> Any:
        return {"features": super().encode_image(images)}


class Broken(Towers):
    """Gives no numbers."""

    def encode_text(self, ids: Tensor) -> Any:
        return super().encode_text(ids) * torch.nan


class Asking(Towers):
    """Wants more than ids and mask."""

    def encode_text(self, ids: Tensor, mask: Tensor, extra: Tensor) -> Any:  # type: ignore[override]
        return super().encode_text(ids)


def wrap(make: Any = Towers, **changes: Any) -> TwoTowers:
    return TwoTowers(make, CONFIG, text=TEXT, pad_id=9, **changes)


def test_features_have_length_one_and_pixels_are_scaled() -> None:
    towers = TwoTowers(
        Towers, TowersConfig(name="t", image_size=8, context_length=6, pixel_mean=(0.5, 0.5, 0.5)), text=TEXT
    )
    levels = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    features = towers.encode_image(levels)
    assert towers.config.feature_dim == features.shape[1] == 5
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(features, towers.encode_image(levels.float() / 255))
    raw = towers.towers.encode_image(levels.float() / 255 - 0.5)  # type: ignore[operator]
    torch.testing.assert_close(features, nn.functional.normalize(raw, dim=1))


def test_what_gets_no_gradient_is_frozen_and_the_rest_stays() -> None:
    towers = wrap()
    assert towers.frozen == ("towers.unused.weight", "towers.unused.bias")
    trained = [name for name, parameter in towers.named_parameters() if parameter.requires_grad]
    assert trained == ["own_scale", "towers.image.weight", "towers.image.bias", "towers.words.weight"]
    assert all(parameter.grad is None for parameter in towers.parameters())
    assert towers.training


def test_texts_do_not_depend_on_what_pads_them() -> None:
    """To a model without a mask each text has the whole context; another one gets the mask."""
    longer = TextTokens(nn.functional.pad(TEXT.ids, (0, 2), value=9), nn.functional.pad(TEXT.mask, (0, 2)))
    for make in (Towers, Masked):
        towers = wrap(make)
        torch.testing.assert_close(towers.encode_text(TEXT), towers.encode_text(longer))


def test_its_own_scale_counts() -> None:
    assert math.isclose(float(wrap().logit_scale.detach().exp()), 1 / 0.07, rel_tol=1e-5)
    towers = wrap(partial(Towers, scale=torch.tensor([2.0])))
    assert towers.logit_scale.shape == ()
    assert float(towers.logit_scale.detach()) == 2
    assert "own_scale" not in towers.state_dict()


def test_another_one_has_the_same_names_and_shapes() -> None:
    towers = wrap()
    again = towers.build_again()
    again.load_state_dict(towers.state_dict())
    torch.testing.assert_close(again.encode_text(TEXT), towers.encode_text(TEXT))
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in towers.parameters()]


def test_layers_that_mix_rows_are_named() -> None:
    assert wrap(Mixed).batch_norm() == "norm"
    assert wrap().batch_norm() is None


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (partial(nn.Linear, 2, 2), "has no method encode_image; give it encode_image"),
        (dict, "makes dict, which is no torch.nn.Module"),
        (partial(Towers, text_width=4), r"encode_image gives \(2, 5\) for two, encode_text gives \(2, 4\) for two"),
        (Broken, "encode_text gives features that are not finite"),
        (Asking, "encode_text fails: TypeError: .*'extra'"),
        (Wrapped, "an encoder gives dict; it must give a tensor of features"),
        (partial(Towers, scale=torch.tensor(100.0)), "its logit_scale is 100, .* keep its logarithm.*: 4.605"),
        (partial(Towers, scale=torch.tensor(14.2857)), "keep its logarithm, as CLIP does: 2.659"),
        (partial(Towers, scale=torch.tensor(math.nan)), "keep a finite logarithm"),
        (partial(Towers, scale=torch.zeros(3)), "its logit_scale has 3 values"),
    ],
)
def test_what_is_no_model_of_two_towers(make: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        wrap(make)


def test_tokenizers() -> None:
    ids = torch.ones((2, 3), dtype=torch.int32)
    assert ForeignTokenizer(lambda texts: ids, "t")(["a", "b"]).mask.all()
    both = ForeignTokenizer(lambda texts: {"input_ids": ids, "attention_mask": ids * 0}, "t")(["a", "b"])
    assert both.ids.dtype == torch.int64
    assert not both.mask.any()
    for wrong in (ids.float(), ids[:1], [1, 2, 3]):
        with pytest.raises(UserError, match=r"it must give whole numbers, \(2, T\)"):
            ForeignTokenizer(lambda texts, wrong=wrong: wrong, "t")
    with pytest.raises(UserError, match="cannot be called"):
        ForeignTokenizer(3, "t")  # type: ignore[arg-type]
