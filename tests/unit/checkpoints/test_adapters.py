"""The name table: a bijection on every parameter of every model, and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m2_encoder import M2Encoder, M2EncoderConfig
from m2_encoder.checkpoints.adapters import NAME_TABLE, official_to_ours, ours_to_official, to_official_state
from tests.support.models import small_config


@pytest.mark.parametrize("name", ["tiny", "m2-encoder-0.4b", "m2-encoder-10b"])
def test_round_trip_of_every_name(name: str) -> None:
    with torch.device("meta"):
        ours = list(M2Encoder(M2EncoderConfig.from_name(name)).state_dict())
    official = [ours_to_official(key) for key in ours]
    assert None not in official
    assert len(set(official)) == len(ours)
    assert [official_to_ours(str(key)) for key in official] == ours


def test_every_row_is_used() -> None:
    with torch.device("meta"):
        model = M2Encoder(small_config())
    official = to_official_state(model.state_dict())
    for row in NAME_TABLE:
        start = row[0].split("{")[0]
        assert any(key.startswith(start) for key in official), row


@pytest.mark.parametrize(
    ("official", "ours"),
    [
        ("backbone.text_embed.weight", "text_embed.tokens.weight"),
        ("backbone.encoder.embed_positions.A.weight", "image_embed.positions.weight"),
        (
            "backbone.encoder.layers.20.self_attn.q_proj.B.bias",
            "backbone.layers.20.text_expert.q_proj.bias",
        ),
        ("backbone_vl.layers.0.ffn.A.fc2.weight", "vl_encoder.layers.0.vision_expert.fc2.weight"),
        ("backbone_vl.layer_norm.B.bias", "vl_encoder.norm.text_expert.bias"),
        ("itc_vl_image_proj.fc.weight", "vl_image_proj.weight"),
    ],
)
def test_examples(official: str, ours: str) -> None:
    """The letter stands behind a projection, but before the parts of the feed-forward network."""
    assert official_to_ours(official) == ours
    assert ours_to_official(ours) == official


@pytest.mark.parametrize(
    "name",
    [
        "",
        "backbone.encoder.layers.0.self_attn.q_proj.C.weight",
        "backbone.encoder.layers.x.self_attn.q_proj.A.weight",
        "backbone.encoder.layers.0.ffn.fc1.A.weight",
        "xlogit_scale",
        "logit_scale.weight",
        "backbone.vision_embed.proj.weightx",
    ],
)
def test_foreign_names(name: str) -> None:
    assert official_to_ours(name) is None


@given(st.text())
def test_any_text_is_a_name_or_none(name: str) -> None:
    ours = official_to_ours(name)
    assert ours is None or ours_to_official(ours) == name


def test_unknown_name_of_ours_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'backbone\.extra' has no official name"):
        to_official_state({"backbone.extra": 1})
