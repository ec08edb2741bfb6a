"""The alignment with a constant mixture: value and gradients, whatever the tiles, and only those that are wanted."""

from __future__ import annotations

import pytest
import torch

from m2_encoder.objectives import alignment
from m2_encoder.objectives.alignment import mean_alignment


@pytest.mark.parametrize("tile_rows", [1, 3, 100])
@pytest.mark.parametrize(("wants_queries", "wants_keys"), [(True, True), (True, False), (False, True)])
def test_value_and_gradients(
    tile_rows: int, wants_queries: bool, wants_keys: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alignment, "_TILE_BYTES", tile_rows * 8 * 5)
    queries = torch.randn(7, 4, dtype=torch.float64).requires_grad_(wants_queries)
    keys = torch.randn(5, 4, dtype=torch.float64).requires_grad_(wants_keys)
    shares = torch.randn(7, 5, dtype=torch.float64)
    found = mean_alignment(queries, keys, keys.detach(), lambda some: shares[some], group=None)
    expected = sum(
        (shares[i, j] * (queries[i] @ keys[j]) for i in range(7) for j in range(5)),
        torch.zeros((), dtype=torch.float64),
    )
    torch.testing.assert_close(found.mean, expected / 7)
    torch.testing.assert_close(found.mixed, shares @ keys.detach())
    assert not found.mixed.requires_grad
    wanted = [side for side in (queries, keys) if side.requires_grad]
    ours = torch.autograd.grad(2.5 * found.mean, wanted)
    for own, theirs in zip(ours, torch.autograd.grad(2.5 * expected / 7, wanted), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-12, atol=1e-14)
