"""Resizing image position tables, and stretching those of texts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from m2_encoder import CheckpointError
from m2_encoder.checkpoints.exported import CONFIG_METADATA_KEY, config_text
from m2_encoder.checkpoints.positions import (
    TEXT_POSITIONS,
    check_stretch,
    find_context_length,
    resize_image_positions,
    stretch_text_positions,
)
from m2_encoder.errors import UserError
from m2_encoder.models.config import M2EncoderConfig
from tests.support.closeness import assert_close_in_ulps


@given(old=st.integers(1, 9), new=st.integers(1, 9), width=st.integers(1, 5))
def test_equals_averages_over_areas(old: int, new: int, width: int) -> None:
    """Written out: a new cell is the mean of the old cells it touches."""
    table = torch.rand(old * old + 3, width)  # of one sign: nothing cancels
    resized = resize_image_positions(table, new * new + 3)
    assert torch.equal(resized[:3], table[:3])
    cells = table[3:].view(old, old, width)
    for row in range(new):
        rows = slice(row * old // new, -(-(row + 1) * old // new))
        for column in range(new):
            columns = slice(column * old // new, -(-(column + 1) * old // new))
            expected = cells[rows, columns].mean(dim=(0, 1))
            assert_close_in_ulps(resized[3 + row * new + column], expected)


def test_equal_grid_is_the_same_tensor() -> None:
    table = torch.randn(19, 4)
    assert resize_image_positions(table, 19) is table


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keeps_the_dtype_and_computes_in_fp32(dtype: torch.dtype) -> None:
    table = torch.randn(67, 4).to(dtype)
    resized = resize_image_positions(table, 19)
    assert resized.dtype == dtype
    assert torch.equal(resized[3:], resize_image_positions(table.float(), 19)[3:].to(dtype))


@pytest.mark.parametrize(("rows", "new"), [(3, 19), (2, 19), (0, 19), (20, 19), (19, 20), (15, 19)])
def test_no_square_grid(rows: int, new: int) -> None:
    with pytest.raises(CheckpointError, match="has no square grid"):
        resize_image_positions(torch.zeros(rows, 4), new)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model": {"context_length": 10}}), encoding="utf-8")
    save_file({"some": torch.zeros(1)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(("keep", "new", "rows", "grown"), [(4, 16, 32, 32), (1, 30, 20, 32), (9, 12, 14, 40)])
def test_stretches_what_was_trained(weights: Path, keep: int, new: int, rows: int, grown: int) -> None:
    """Positions before `keep` to the bit, the others by numpy's own interpolation, both ends exact."""
    table = torch.randn(rows, 3)
    state = {TEXT_POSITIONS: table.clone()}
    config = M2EncoderConfig(context_length=new, num_text_positions=grown)
    stretch_text_positions(state, config, keep=keep, weights=weights)
    found = state[TEXT_POSITIONS]
    assert found.shape == (grown, 3)
    assert torch.equal(found[: 2 + keep], table[: 2 + keep])
    places = np.linspace(keep, 9, new - keep)
    for column in range(3):
        expected = np.interp(places, np.arange(10), table[2:12, column].double().numpy())
        np.testing.assert_allclose(found[2 + keep : 2 + new, column].numpy(), expected, atol=1e-6)
    assert torch.equal(found[2 + new : rows], table[2 + new :]), "what nobody reads stays"
    assert torch.isfinite(found).all()


def test_the_length_of_weights(weights: Path) -> None:
    assert find_context_length(weights, model="m2-encoder-0.4b") == 10
    assert find_context_length(weights / "model.safetensors", model="m2-encoder-0.4b") == 10
    (weights / "config.json").unlink()
    assert find_context_length(weights, model="m2-encoder-0.4b") == 52
    assert find_context_length(weights, model="tiny") == 24
    checkpoint = weights / "run" / "checkpoints" / "last.ckpt"
    with pytest.raises(CheckpointError, match="is of a run without an export"):
        find_context_length(checkpoint, model="tiny")


def test_weights_say_their_length_wherever_they_are(weights: Path) -> None:
    moved = weights / "moved.safetensors"
    said = {CONFIG_METADATA_KEY: config_text(M2EncoderConfig(context_length=60))}
    save_file({"some": torch.zeros(1)}, moved, metadata=said)
    assert find_context_length(moved, model="tiny") == 60, "not that of the configuration beside it, or of its name"


@pytest.mark.parametrize(
    ("keep", "new", "key", "said"),
    [
        (10, 20, "stretch_positions", "must be below 10"),
        (4, 10, "context_length", "must be above 10"),
    ],
)
def test_what_is_no_stretch(keep: int, new: int, key: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        check_stretch(keep, old=10, new=new)
    assert caught.value.key == key
