"""The cross-entropy that never holds its logits equals the plain one, at a fraction of the memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from m2_encoder.errors import UserError
from m2_encoder.models import token_prediction
from m2_encoder.models.token_prediction import token_cross_entropy
from m2_encoder.objectives import encode_pieces
from tests.support.closeness import assert_close_in_ulps

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def draw(rows: int, *, vocab: int = 50, width: int = 8, dtype: torch.dtype = torch.float64) -> Inputs:
    generator = torch.Generator().manual_seed(rows)
    states, table, bias = (
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
        for shape in ((rows, width), (vocab, width), (vocab,))
    )
    return states, table, bias, torch.randint(vocab, (rows,), generator=generator)


def plain(states: Tensor, table: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = states @ table.t() + bias
    return functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(dim=1) == targets


@pytest.mark.parametrize("rows", [0, 1, 7, 40])
def test_losses_hits_and_gradients(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_prediction, "_TILE_BYTES", 3 * 4 * 50)  # three rows a tile
    inputs = draw(rows)
    upstream = torch.randn(rows, dtype=torch.float64)
    losses, hits = token_cross_entropy(*inputs)
    expected, expected_hits = plain(*inputs)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(hits, expected_hits)
    found = torch.autograd.grad(losses, inputs[:3], upstream)
    for own, wanted in zip(found, torch.autograd.grad(expected, inputs[:3], upstream), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-11, atol=1e-12)


def test_parts_that_are_frozen_cost_nothing() -> None:
    states, table, bias, targets = draw(5)
    losses, _ = token_cross_entropy(states, table.detach(), bias.detach(), targets)
    losses.sum().backward()
    assert states.grad is not None
    torch.testing.assert_close(
        states.grad, torch.autograd.grad(plain(states, table, bias, targets)[0].sum(), states)[0]
    )
    assert table.grad is None


def test_half_precision_products_sum_in_fp32() -> None:
    states, table, bias, targets = draw(64, vocab=500, width=64, dtype=torch.float32)
    expected, _ = plain(states, table, bias, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = token_cross_entropy(states, table, bias, targets)
    assert losses.dtype == torch.float32
    assert (losses - expected).abs().mean() < 0.1
    found = torch.autograd.grad(losses.mean(), [states, table, bias])
    for own, wanted in zip(found, torch.autograd.grad(expected.mean(), [states, table, bias]), strict=True):
        assert own.dtype == torch.float32
        assert (own - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("rows_of_a_tile", [3, 100])
def test_of_equal_scores_the_first_is_the_prediction(rows_of_a_tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As argmax has it, by which predictions are read: a table that says the same of all tokens is not right of all."""
    monkeypatch.setattr(token_prediction, "_TILE_BYTES", rows_of_a_tile * 4 * 50)
    states, table, bias, _ = draw(64, dtype=torch.float32)
    with torch.no_grad():
        states[:32] = 0.0
        bias.copy_(bias.round())
        table[25:] = table[:25]  # every score comes twice
        bias[25:] = bias[:25]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        said = (functional.linear(states, table) + bias).argmax(dim=1)
        scores = functional.linear(states, table) + bias
        for targets, expected in ((said, True), (said + 25, False)):
            assert torch.equal(scores.gather(1, targets[:, None]).squeeze(1), scores.amax(dim=1))
            _, hits = token_cross_entropy(states, table, bias, targets)
            assert (hits == expected).all()


def test_gradients_of_a_table_in_half_precision_add_up_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_prediction, "_TILE_BYTES", 2 * 4 * 500)  # two rows a tile: 300 sums
    states, table, bias, targets = draw(600, vocab=500, width=16, dtype=torch.float32)
    half = [part.detach().bfloat16().requires_grad_() for part in (states, table, bias)]
    wide = [part.detach().float().requires_grad_() for part in half]
    losses, _ = token_cross_entropy(half[0], half[1], half[2], targets)
    found = torch.autograd.grad(losses.mean(), half)
    expected = torch.autograd.grad(plain(wide[0], wide[1], wide[2], targets)[0].mean(), wide)
    for own, wanted in zip(found, expected, strict=True):
        assert own.dtype == torch.bfloat16
        assert (own - wanted).norm() < 0.005 * wanted.norm()


@pytest.mark.parametrize("rows_of_a_tile", [3, 100])
def test_backward_comes_twice_but_not_of_itself(rows_of_a_tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_prediction, "_TILE_BYTES", rows_of_a_tile * 4 * 50)
    states, table, bias, targets = draw(7)
    losses, _ = token_cross_entropy(states, table, bias, targets)
    first = torch.autograd.grad(losses.sum(), [states, table, bias], retain_graph=True)
    for own, wanted in zip(torch.autograd.grad(losses.sum(), [states, table, bias]), first, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-12, atol=1e-13)
    losses, _ = token_cross_entropy(states, table, bias, targets)
    with pytest.raises(UserError, match="no second derivative; call backward with create_graph=False"):
        torch.autograd.grad(losses.sum(), states, create_graph=True)


def test_pieces_that_are_computed_again_keep_no_tile() -> None:
    states, table, bias, targets = draw(64, vocab=20_000, dtype=torch.float32)

    def piece(rows: Tensor) -> tuple[Tensor, ...]:
        return token_cross_entropy(rows, table, bias, targets)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        losses, _ = encode_pieces(piece, [states * factor for factor in (1.0, 0.5)], recompute=True)
    events = measured.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = sum(event.nbytes() for event in events if event.name() == "[memory]")
    assert held < 64 * 20_000 * 4 / 10
    found = torch.autograd.grad(losses.sum(), states)[0]
    expected = sum(plain(states * factor, table, bias, targets)[0].sum() for factor in (1.0, 0.5))
    assert_close_in_ulps(found, torch.autograd.grad(expected, states)[0])


@pytest.mark.parametrize("value", [-torch.inf, torch.inf, torch.nan])
def test_values_that_are_not_finite_are_those_of_torch(value: float) -> None:
    states, table, bias, targets = draw(6, dtype=torch.float32)
    with torch.no_grad():
        bias[int(targets[0])] = value
    (losses, hits), (expected, _) = (
        token_cross_entropy(states, table, bias, targets),
        plain(states, table, bias, targets),
    )
    assert_close_in_ulps(losses, expected)
    assert not hits[0] or value == torch.inf
    found = torch.autograd.grad(losses.sum(), [states, table, bias])
    for own, wanted in zip(found, torch.autograd.grad(expected.sum(), [states, table, bias]), strict=True):
        assert_close_in_ulps(own, wanted)


def test_extreme_logits_stay_finite() -> None:
    states, table, bias, targets = draw(4, dtype=torch.float32)
    losses, _ = token_cross_entropy(states * 1e4, table, bias, targets)
    assert losses.isfinite().all()
    assert all(part.isfinite().all() for part in torch.autograd.grad(losses.sum(), [states, table, bias]))


def test_memory_is_that_of_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_prediction, "_TILE_BYTES", 1 << 20)
    states, table, bias, targets = draw(800, vocab=20_000, width=16, dtype=torch.float32)

    def peak(function: object) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
            assert callable(function)
            losses, _ = function(states, table, bias, targets)
            losses.mean().backward()
        held = highest = 0
        for event in measured.profiler.kineto_results.events():  # type: ignore[union-attr]
            if event.name() == "[memory]":
                held += event.nbytes()
                highest = max(highest, held)
        return highest

    ours, theirs = peak(token_cross_entropy), peak(plain)
    assert theirs > 2 * 800 * 20_000 * 4
    assert ours < theirs / 20
