"""Tiles of logits against the whole matrix, with tile sides that divide nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from m2_encoder.objectives import contrastive_tiles, image_text_contrastive
from m2_encoder.objectives.contrastive_tiles import Softmax, Tiles
from tests.support.closeness import assert_close_in_ulps


def unit_rows(count: int, seed: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    rows = torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (rows / rows.norm(dim=1, keepdim=True)).to(dtype)


def make_tiles(scale: float, sides: tuple[int, int], *, dtype: torch.dtype = torch.float64) -> Tiles:
    tiles = Tiles(torch.tensor(scale, dtype=dtype))
    tiles._sides = sides
    return tiles


SIZES = {
    "queries": st.integers(1, 7),
    "keys": st.integers(1, 7),
    "sides": st.tuples(st.integers(1, 4), st.integers(1, 4)),
    "scale": st.sampled_from([0.5, 20.0, 69.0, 71.0, 100.0, 200.0]),
    "seed": st.integers(0, 2**16),
}


@settings(max_examples=80)
@given(**SIZES)
def test_sums_of_exponentials_and_logsumexps(
    queries: int, keys: int, sides: tuple[int, int], scale: float, seed: int
) -> None:
    rows, columns = unit_rows(queries, seed), unit_rows(keys, seed + 1)
    logits = scale * rows @ columns.t()
    tiles = make_tiles(scale, sides)
    row_sums, column_sums = torch.full((queries,), 3.0).double(), torch.zeros(keys, dtype=torch.float64)
    tiles.exp_sums(rows, columns, row_sums, column_sums)
    shifted = (logits - max(0.0, scale - 70)).exp()
    torch.testing.assert_close(row_sums, 3 + shifted.sum(dim=1), rtol=1e-11, atol=0)
    torch.testing.assert_close(column_sums, shifted.sum(dim=0), rtol=1e-11, atol=0)

    row_lse = torch.full((queries,), -torch.inf, dtype=torch.float64)
    column_lse = torch.full((keys,), 1.25, dtype=torch.float64)  # what stands there already counts
    tiles.logsumexps(rows, columns, row_lse, column_lse)
    torch.testing.assert_close(row_lse, logits.logsumexp(dim=1), rtol=1e-12, atol=1e-12)
    with_more = torch.logaddexp(logits.logsumexp(dim=0), torch.tensor(1.25, dtype=torch.float64))
    torch.testing.assert_close(column_lse, with_more, rtol=1e-12, atol=1e-12)


@settings(max_examples=80)
@given(**SIZES, in_range=st.booleans(), with_keys=st.booleans())
def test_products_of_weighted_probabilities(
    queries: int,
    keys: int,
    sides: tuple[int, int],
    scale: float,
    seed: int,
    in_range: bool,
    with_keys: bool,
) -> None:
    rows, columns = unit_rows(queries, seed), unit_rows(keys, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    logits = scale * rows @ columns.t()

    def softmax(own: Tensor) -> Softmax:
        # As if more keys than these were elsewhere: a softmax need not sum to one over a block.
        more = torch.rand(len(own), dtype=torch.float64, generator=generator)
        return Softmax(own + more, torch.rand(len(own), dtype=torch.float64, generator=generator))

    query_side, key_side = softmax(logits.logsumexp(dim=1)), softmax(logits.logsumexp(dim=0))
    weighted = query_side.weight[:, None] * (logits - query_side.lse[:, None]).exp()
    weighted += key_side.weight * (logits - key_side.lse).exp()
    before = torch.ones(queries, 3, dtype=torch.float64), torch.ones(keys, 3, dtype=torch.float64)
    query_grad, key_grad = before[0].clone(), before[1].clone()
    make_tiles(scale, sides).add_products(
        rows,
        columns,
        query_side=query_side,
        key_side=key_side,
        query_grad=query_grad,
        key_grad=key_grad if with_keys else None,
        in_range=in_range,
    )
    torch.testing.assert_close(query_grad, before[0] + weighted @ columns, rtol=0, atol=1e-11)
    torch.testing.assert_close(key_grad, before[1] + weighted.t() @ rows * with_keys, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_range_says_when_the_shift_is_too_far(dtype: torch.dtype) -> None:
    """At scale 200 the shift is 130: a row whose logits are all near 0 has no exponential that fp32 can hold."""
    tiles = make_tiles(200.0, (2, 2), dtype=dtype)
    fine, far = torch.tensor([130.0, 71.0, 207.0], dtype=dtype), torch.tensor([130.0, 69.0], dtype=dtype)
    assert tiles.in_range(fine)
    assert tiles.in_range(fine, fine[:0])
    assert not tiles.in_range(far)
    assert not tiles.in_range(fine, far)
    for value in (torch.nan, torch.inf, -torch.inf):
        assert not tiles.in_range(torch.tensor([130.0, value], dtype=dtype))


@pytest.mark.parametrize("scale", [1.0, 70.0, 100.0, 500.0])
def test_what_is_in_range_is_exact_in_fp32(scale: float) -> None:
    """Both ways agree wherever `in_range` admits the fast one, down to its very limit."""
    rows, columns = unit_rows(400, 1, dtype=torch.float32), unit_rows(7, 2, dtype=torch.float32)
    tiles = make_tiles(scale, (64, 3), dtype=torch.float32)
    sums, lse = torch.zeros(400), torch.full((400,), -torch.inf)
    tiles.exp_sums(rows, columns, sums)
    tiles.logsumexps(rows, columns, lse)
    admitted = torch.tensor([tiles.in_range(value[None]) for value in lse])
    assert admitted.any()
    assert scale < 200 or not admitted.all(), "the limit was never reached"
    assert_close_in_ulps((tiles.shift + sums.log())[admitted], lse[admitted], ulps=16)


def test_the_memory_of_a_tile_serves_them_all() -> None:
    """New memory for every tile would cost more than its arithmetic, and grow with the matrix."""
    rows = unit_rows(50, 1)
    tiles = make_tiles(10.0, (7, 11))
    for _ in range(2):
        tiles.exp_sums(rows, rows, torch.zeros(50, dtype=torch.float64))
    assert sum(part.numel() for part in tiles._scratch) <= 77


def test_bf16_products_keep_the_gradient_of_pairs_that_match_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products of tensor cores, played on the CPU: probabilities near 1 must survive the subtraction of targets."""
    monkeypatch.setattr(contrastive_tiles, "_multiplies_in_half", lambda features: features.dtype == torch.bfloat16)
    monkeypatch.setattr(contrastive_tiles, "_half_product", lambda left, right: left.float() @ right.float())
    generator = torch.Generator().manual_seed(3)
    texts = nn.functional.normalize(torch.randn(48, 32, generator=generator), dim=1)
    images = nn.functional.normalize(texts + 0.02 * torch.randn(48, 32, generator=generator), dim=1)
    scale = torch.tensor(math.log(12.0))
    halves = [side.bfloat16().requires_grad_() for side in (images, texts)]
    exact = [side.detach().double().requires_grad_() for side in halves]
    image_text_contrastive(*halves, scale).backward()
    loss = image_text_contrastive(*exact, scale.double())
    loss.backward()
    assert loss < 0.02, "pairs that match badly would prove nothing"
    for half, wanted in zip(halves, exact, strict=True):
        assert half.grad is not None
        assert wanted.grad is not None
        error = (half.grad.double() - wanted.grad).norm() / wanted.grad.norm()
        assert error < 0.01
