"""Numbers of reconstructions."""

from __future__ import annotations

import pytest
import torch

from m2_encoder.evaluation.reconstruction import perplexity, psnr


def test_numbers_are_those_of_their_formulas() -> None:
    assert perplexity(torch.tensor([5, 5, 5, 5, 0])) == pytest.approx(4)
    assert perplexity(torch.zeros(3)) == 0
    true = torch.zeros(2, 3, 4, 4)
    drawn = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.01)])
    torch.testing.assert_close(psnr(true, drawn), torch.tensor([20.0, 40.0]))
