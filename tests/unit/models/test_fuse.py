"""States of selected tokens where image and text meet, against the whole sequence computed token by token."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m2_encoder.models.config import M2EncoderConfig
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.models.parallelize import checkpoint_layers
from m2_encoder.models.selected_tokens import SelectedTokens

CONFIG = dataclasses.replace(
    M2EncoderConfig.from_name("tiny"),
    embed_dim=16,
    num_heads=2,
    num_layers=1,
    feature_dim=8,
    image_size=16,
    patch_size=8,
)
IMAGES, LENGTH = 3, 6
TOKENS = 5  # of an image


def make_model(layers: int) -> M2Encoder:
    torch.manual_seed(layers)
    model = M2Encoder(dataclasses.replace(CONFIG, num_vl_layers=layers)).double()
    for parameter in model.vl_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_hidden(captions: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(captions)
    rows = IMAGES * captions
    image = torch.randn((IMAGES, TOKENS, 16), generator=generator, dtype=torch.float64)
    text = torch.randn((rows, LENGTH, 16), generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, LENGTH + 1, (rows, 1), generator=generator)
    return image.requires_grad_(), text.requires_grad_(), torch.arange(LENGTH) < lengths


def compute_all(
    model: M2Encoder, image: Tensor, text: Tensor, mask: Tensor, *, attention: Tensor | None, text_expert: bool
) -> Tensor:
    """Every token of every sequence, in the layers' ordinary forward."""
    image = image.repeat_interleave(len(text) // len(image), dim=0)
    return model.vl_encoder(
        torch.cat([image, text], dim=1),
        num_image_tokens=TOKENS if text_expert else TOKENS + LENGTH,
        token_mask=torch.cat([mask.new_ones(image.shape[:2]), mask], dim=1),
        attention_mask=attention,
    )


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("captions", [1, 2])
@pytest.mark.parametrize("text_expert", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("select_from", ["image", "text"])
def test_chosen_states_and_their_gradients(
    layers: int, captions: int, text_expert: bool, causal: bool, select_from: Literal["image", "text"]
) -> None:
    model, (image, text, mask) = make_model(layers), make_hidden(captions)
    attention = None
    if causal:
        attention = torch.ones((TOKENS + LENGTH,) * 2, dtype=torch.bool).tril()
        attention[:TOKENS, :TOKENS] = True
    selected = torch.rand(mask.shape if select_from == "text" else (len(mask), TOKENS)) < 0.5
    selected[0] = False  # a row without any
    selected[-1] = True
    selected = selected & mask if select_from == "text" else selected
    found = model.fuse(
        image, text, mask, selected=selected, select_from=select_from, attention_mask=attention, text_expert=text_expert
    )
    whole = compute_all(model, image, text, mask, attention=attention, text_expert=text_expert)
    expected = (whole[:, TOKENS:] if select_from == "text" else whole[:, :TOKENS])[selected]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(expected)
    inputs = [image, text, *model.vl_encoder.parameters()]
    options = {"allow_unused": True, "materialize_grads": True}
    ours = torch.autograd.grad((found * weights).sum(), inputs, **options)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs, **options)
    for own, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-9, atol=1e-11)


def test_first_tokens_by_default() -> None:
    model, (image, text, mask) = make_model(1), make_hidden(2)
    whole = compute_all(model, image, text, mask, attention=None, text_expert=False)
    torch.testing.assert_close(model.fuse(image, text, mask), whole[:, TOKENS])


def test_recomputed_layers_give_the_same() -> None:
    model, (image, text, mask) = make_model(2), make_hidden(2)
    plain = torch.autograd.grad(model.fuse(image, text, mask, selected=mask).square().sum(), [image, text])
    checkpoint_layers(model)
    again = torch.autograd.grad(model.fuse(image, text, mask, selected=mask).square().sum(), [image, text])
    for own, wanted in zip(again, plain, strict=True):
        assert torch.equal(own, wanted)


def test_nothing_chosen_is_no_state_and_no_gradient_but_zero() -> None:
    model, (image, text, mask) = make_model(1), make_hidden(1)
    found = model.fuse(image, text, mask, selected=torch.zeros_like(mask))
    assert found.shape == (0, 16)
    (gradient,) = torch.autograd.grad(found.sum(), [image])
    assert not gradient.any()


def test_a_dropped_branch_is_dropped_for_a_whole_row() -> None:
    """Stochastic depth: where both branches are dropped, tokens pass unchanged but for the final norm."""
    model = make_model(1)
    image, text, mask = (part.repeat(5, *[1] * (part.dim() - 1)) for part in make_hidden(1))
    layer = model.vl_encoder.layers[0]
    layer.drop_path = 0.5
    found = model.fuse(image, text, mask, selected=mask)
    rows = mask.nonzero()[:, 0]
    layer.drop_path = 0.0
    expert = layer.vision_expert
    for part in (expert.out_proj, expert.fc2):
        torch.nn.init.zeros_(part.weight)
        torch.nn.init.zeros_(part.bias)
    unchanged = (found - model.fuse(image, text, mask, selected=mask)).abs().amax(dim=1) < 1e-9
    by_row = [set(unchanged[rows == row].tolist()) for row in range(len(mask))]
    assert all(len(fates) == 1 for fates in by_row), "tokens of one row met different fates"
    assert len(set.union(*by_row)) == 2, "no row was dropped, or all were"


@settings(max_examples=60)
@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=6))
def test_tokens_come_back_from_their_rectangle(flags: list[list[bool]]) -> None:
    selected = torch.tensor(flags)
    tokens = SelectedTokens(selected)
    x = torch.arange(selected.numel() * 2).reshape(*selected.shape, 2)
    taken = tokens.take(x)
    assert torch.equal(taken, x[selected])
    spread = tokens.spread(taken)
    assert spread.shape[1] == max(map(sum, flags))
    assert torch.equal(tokens.collect(spread), taken)
    for row, wanted in enumerate(selected.sum(dim=1).tolist()):
        assert torch.equal(spread[row, :wanted], x[row][selected[row]])
