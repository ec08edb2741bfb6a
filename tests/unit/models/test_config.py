"""The architecture: impossible values, names, and the configuration of the official release."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2_encoder import M2EncoderConfig, UserError
from m2_encoder.models.config import NAME_TO_CONFIG
from tests.support.models import small_config

OFFICIAL: dict[str, Any] = {
    "beit_version": "base",
    "encoder_embed_dim": 768,
    "encoder_layers": 9,
    "beit3_vl_layers": 3,
    "out_embed_dim": 768,
    "image_size": 224,
    "patch_size": 16,
    "vocab_size": 115244,
    "max_text_len": 52,
    "drop_path_rate": 0.1,
    "flash_attn": True,
    "precision": 16,
    "loss_names": {"itc": 1},
}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("embed_dim", 0, "embed_dim=0: must be a whole number, in 1..65536"),
        ("num_heads", -2, "num_heads=-2: must be a whole number, in 1..4096"),
        ("num_layers", 2.0, r"num_layers=2\.0: must be a whole number, in 1..1024"),
        ("num_vl_layers", 0, "num_vl_layers=0: must be"),
        ("vocab_size", "many", "vocab_size=many: must be"),
        ("patch_size", True, "patch_size=True: must be"),
        ("num_heads", 3, "embed_dim=16: must be a multiple of num_heads=3"),
        ("image_size", 18, "image_size=18: must be a multiple of patch_size=4; for example 16"),
        ("context_length", 19, r"context_length=19: must be in 2\.\.18"),
        ("context_length", 1, r"context_length=1: must be in 2\.\.18"),
        ("drop_path_rate", 1.0, r"drop_path_rate=1\.0: must be a number, 0 or more and below 1"),
        ("drop_path_rate", "a lot", "drop_path_rate=a lot: must be"),
        ("layer_norm_eps", 0, r"layer_norm_eps=0: must be a number, 1e-12 or more and below 1"),
    ],
)
def test_impossible_value(field: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        small_config(**{field: value})


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(UserError) as caught:
        small_config(embed_dim=0, num_layers=-1, drop_path_rate=2, layer_norm_eps=-1)
    assert all(name in str(caught.value) for name in ("embed_dim", "num_layers", "drop_path_rate", "layer_norm"))
    with pytest.raises(UserError) as caught:
        small_config(num_heads=3, image_size=18, context_length=99)
    assert all(name in str(caught.value) for name in ("num_heads", "image_size", "context_length"))
    assert "\n" not in str(caught.value)


def test_derived_sizes() -> None:
    config = M2EncoderConfig.from_name("m2-encoder-0.4b")
    sizes = (config.grid_size, config.num_image_tokens, config.num_image_positions)
    assert sizes == (14, 197, 199)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("m2-encoder-0.4b", (768, 12, 9, 3, 768)),
        ("m2-encoder-1b", (1024, 16, 21, 3, 1024)),
        ("m2-encoder-10b", (4096, 32, 21, 3, 1024)),
    ],
)
def test_published_sizes(name: str, shape: tuple[int, ...]) -> None:
    config = M2EncoderConfig.from_name(name)
    fields = (config.embed_dim, config.num_heads, config.num_layers, config.num_vl_layers, config.feature_dim)
    assert fields == shape
    common = (config.image_size, config.patch_size, config.vocab_size, config.context_length)
    assert common == (224, 16, 115244, 52)
    assert (config.num_text_positions, config.ffn_ratio, config.layer_norm_eps) == (1024, 4, 1e-5)


def test_names() -> None:
    assert all(config.name == name for name, config in NAME_TO_CONFIG.items())
    assert M2EncoderConfig.from_name("tiny", image_size=96).image_size == 96
    with pytest.raises(UserError, match=r"unknown model 'big'; known: tiny, m2-encoder-0\.4b"):
        M2EncoderConfig.from_name("big")
    with pytest.raises(UserError, match=r"unknown model field\(s\) colour; known: .*embed_dim"):
        M2EncoderConfig.from_name("tiny", colour=3)


@given(
    image_size=st.integers(1, 12).map(lambda g: 4 * g),
    drop_path_rate=st.floats(0, 0.99),
    context_length=st.integers(2, 18),
)
def test_survives_json(image_size: int, drop_path_rate: float, context_length: int) -> None:
    config = small_config(image_size=image_size, drop_path_rate=drop_path_rate, context_length=context_length)
    assert M2EncoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        small_config().embed_dim = 3  # type: ignore[misc]


# --------------------------------------------------------------------------------------------------- official


def test_official_as_mapping_text_and_file(tmp_path: Path) -> None:
    expected = M2EncoderConfig.from_name("m2-encoder-0.4b")
    path = tmp_path / "official.json"
    path.write_text(json.dumps(OFFICIAL), encoding="utf-8")
    for source in (OFFICIAL, json.dumps(OFFICIAL), f"\n  {json.dumps(OFFICIAL)}", path, str(path)):
        assert M2EncoderConfig.from_official(source) == expected


def test_official_defaults() -> None:
    config = M2EncoderConfig.from_official({"image_size": 224})
    fields = (
        config.embed_dim,
        config.num_layers,
        config.num_vl_layers,
        config.feature_dim,
        config.vocab_size,
    )
    assert fields == (768, 12, 3, 768, 21128)
    assert (config.patch_size, config.context_length, config.num_heads) == (16, 52, 12)


@pytest.mark.parametrize(("size", "heads"), [("base", 12), ("large", 16), ("huge", 32)])
def test_official_size_chooses_heads(size: str, heads: int) -> None:
    official = {**OFFICIAL, "beit_version": size, "encoder_embed_dim": 960}
    assert M2EncoderConfig.from_official(official).num_heads == heads
    assert M2EncoderConfig.from_official({**official, "encoder_attention_heads": 6}).num_heads == 6


def test_official_stochastic_depth_is_not_handed_over() -> None:
    assert M2EncoderConfig.from_official(OFFICIAL).drop_path_rate == 0


def test_other_shapes_have_no_published_name() -> None:
    assert M2EncoderConfig.from_official({**OFFICIAL, "encoder_layers": 4}).name == "official"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({**OFFICIAL, "beit_version": "giant"}, "beit_version='giant' is not one of base, large, huge"),
        ({**OFFICIAL, "one_attn": True, "deepnorm": True}, "switches on one_attn=True, deepnorm=True"),
        ({**OFFICIAL, "mask_ratio": 0.5}, "switches on mask_ratio=0.5"),
        ({**OFFICIAL, "loss_names": {"itc": 0}}, "loss_names.itc=0"),
        ({**OFFICIAL, "beit3_vl_layers": 0}, "num_vl_layers=0: must be"),
        ({"hello": 1}, "not an official M2-Encoder configuration"),
        ("{not json", "is not JSON"),
        ("nowhere.json", "no such file"),
    ],
)
def test_official_that_cannot_be_used(source: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        M2EncoderConfig.from_official(source)


def test_official_file_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="must be a JSON object"):
        M2EncoderConfig.from_official(tmp_path / "list.json")
