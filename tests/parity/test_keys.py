"""Names and shapes of the three published models, built without memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from m2_encoder import M2Encoder, M2EncoderConfig
from m2_encoder.checkpoints.adapters import official_to_ours, to_official_state

SIZES = [("0.4B", "m2-encoder-0.4b", 505), ("1B", "m2-encoder-1b", 985), ("10B", "m2-encoder-10b", 985)]


@pytest.mark.parametrize(("size", "name", "entries"), SIZES)
def test_official_names_and_shapes(parity_dir: Path, size: str, name: str, entries: int) -> None:
    expected = json.loads((parity_dir / f"keys_{size}.json").read_text())
    with torch.device("meta"):
        ours = M2Encoder(M2EncoderConfig.from_name(name)).state_dict()
    official = to_official_state(ours)
    assert len(expected) == entries
    assert {key: list(value.shape) for key, value in official.items()} == expected
    assert {official_to_ours(key) for key in expected} == set(ours)
