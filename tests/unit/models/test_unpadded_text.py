"""Packed texts give what padded ones give, for any mask."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from m2_encoder.models.unpadded_text import UnpaddedText
from m2_encoder.types import TextTokens
from tests.support.models import random_model, small_config


@st.composite
def masks(draw: st.DrawFn) -> torch.Tensor:
    """Any mask without an empty row: holes and hidden first tokens, too."""
    width = draw(st.integers(1, 8))
    rows = draw(st.lists(st.lists(st.booleans(), min_size=width, max_size=width).filter(any), min_size=1, max_size=5))
    return torch.tensor(rows)


@given(masks())
def test_first_tokens_come_first_and_every_token_once(mask: torch.Tensor) -> None:
    unpadded = UnpaddedText(mask)
    kept = mask.clone()
    kept[:, 0] = True
    places = unpadded.places.tolist()
    assert sorted(places) == kept.flatten().nonzero().flatten().tolist()
    assert places[: len(mask)] == [row * mask.shape[1] for row in range(len(mask))]
    assert unpadded.token_mask.sum() == mask.sum()


@given(masks())
def test_attention_within_each_text(mask: torch.Tensor) -> None:
    batch, length = mask.shape
    unpadded = UnpaddedText(mask)
    q, k, v = (torch.randn(batch, 2, length, 4) for _ in range(3))
    expected = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
    packed = [unpadded.strip(x.transpose(1, 2).flatten(2)).unflatten(-1, (2, 4)).transpose(1, 2) for x in (q, k, v)]
    out = unpadded.attend(*packed).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, unpadded.strip(expected.transpose(1, 2).flatten(2)))
    first = unpadded.attend(packed[0][:, :, :batch], *packed[1:])
    torch.testing.assert_close(first.transpose(1, 2).flatten(2)[0], expected[:, :, 0].flatten(1))


@settings(max_examples=30)
@given(masks(), st.integers(0, 1000))
@torch.no_grad()
def test_features_equal_the_padded_pass(mask: torch.Tensor, seed: int) -> None:
    torch.manual_seed(seed)
    model = random_model(small_config(), dtype=torch.float64)
    text = TextTokens(torch.randint(0, 40, mask.shape), mask)
    torch.testing.assert_close(model.encode_text(text), model.forward_text(text).features)


def test_gradients_equal_those_of_the_padded_pass() -> None:
    model = random_model(small_config(), dtype=torch.float64)
    text = TextTokens(torch.randint(0, 40, (3, 6)), torch.arange(6) < torch.tensor([[6], [2], [4]]))
    gradients = []
    for features in (model.encode_text(text), model.forward_text(text).features):
        model.zero_grad()
        (features * torch.arange(12)).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert set(gradients[0]) <= set(gradients[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_stochastic_depth_drops_the_same_texts_packed_and_padded() -> None:
    model = random_model(dataclasses.replace(small_config(), drop_path_rate=0.5), dtype=torch.float64).train()
    text = TextTokens(torch.randint(0, 40, (7, 6)), torch.arange(6) < torch.tensor([[6], [2], [4], [1], [5], [3], [6]]))
    torch.manual_seed(3)
    packed = model.encode_text(text)
    torch.manual_seed(3)
    torch.testing.assert_close(packed, model.forward_text(text).features)
    torch.manual_seed(4)
    assert not torch.allclose(packed, model.encode_text(text))
