"""Every official wrapper loads to the official features, at another image size, too, and is written back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from m2_encoder import M2EncoderConfig, load
from m2_encoder.checkpoints.io import load_model, save_official
from m2_encoder.checkpoints.positions import resize_image_positions
from tests.support.closeness import assert_close_in_ulps

FP32_WRAPPERS = ["pl_state_dict", "deepspeed_module", "model_key", "plain", "plain_forward_module"]
FEATURES = 1e-5
HALF_PRECISION = 6.5e-4  # the official code differs by up to 6.1e-4 after fp16 storage


@pytest.fixture
def folder(parity_dir: Path) -> Path:
    return parity_dir / "checkpoints"


@pytest.fixture
def config(folder: Path) -> M2EncoderConfig:
    return M2EncoderConfig.from_official(folder / "config.json")


@pytest.fixture
def expected(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "expected.safetensors")


@pytest.mark.parametrize("wrapper", [*FP32_WRAPPERS, "pl_state_dict_fp16"])
def test_wrapper(folder: Path, config: M2EncoderConfig, expected: dict[str, Tensor], wrapper: str) -> None:
    model, _, _ = load(config, weights=folder / f"{wrapper}.ckpt")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    image = model.forward_image(expected["image"])
    text = model.forward_text(expected["text_ids"], expected["text_masks"])
    tolerance = FEATURES if wrapper in FP32_WRAPPERS else HALF_PRECISION
    for ours, name in (
        (image.features, "image.cls_vlffn_feats"),
        (image.backbone_features, "image.cls_feats"),
        (text.features, "text.cls_vlffn_feats"),
        (text.backbone_features, "text.cls_feats"),
    ):
        torch.testing.assert_close(ours, expected[name], rtol=0, atol=tolerance, msg=name)


def test_fp32_wrappers_hold_the_same_model(folder: Path, config: M2EncoderConfig) -> None:
    first, *others = (load_model(config, folder / f"{name}.ckpt").state_dict() for name in FP32_WRAPPERS)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("wrapper", FP32_WRAPPERS)
def test_another_image_size(folder: Path, config: M2EncoderConfig, wrapper: str) -> None:
    expected = load_file(folder / "expected_at_96px.safetensors")
    model, preprocess, _ = load(config, weights=folder / f"{wrapper}.ckpt", image_size=96)
    assert preprocess.image_size == model.config.image_size == 96
    table = model.image_embed.positions.weight
    assert_close_in_ulps(table, expected["resized_pos_embed"])
    features = model.encode_image(expected["image"])
    torch.testing.assert_close(features, expected["image.cls_vlffn_feats"], rtol=0, atol=FEATURES)


def test_resize_goldens(folder: Path) -> None:
    """The area-interpolated results in every case; the prefix that the official loader cuts is a defect."""
    goldens = load_file(folder / "pos_embed_resize.safetensors")
    compared = 0
    for name, expected in goldens.items():
        match = re.fullmatch(r"deepspeed\.grid(\d+)_to_grid(\d+)", name)
        if match is None:
            continue
        old, new = map(int, match.groups())
        table = goldens[f"input.grid{old}"]
        resized = resize_image_positions(table, new * new + 3)
        assert_close_in_ulps(resized, expected, msg=name)
        assert torch.equal(resized[:3], table[:3])
        if old == new:
            assert torch.equal(resized, table)
        if old < new:
            assert_close_in_ulps(resized, goldens[f"pl.grid{old}_to_grid{new}"])
        compared += 1
    assert compared == 15


def test_round_trip_gives_the_official_file_back(folder: Path, config: M2EncoderConfig, tmp_path: Path) -> None:
    source = folder / "pl_state_dict.ckpt"
    save_official(load_model(config, source), tmp_path / "again.ckpt")
    official = torch.load(source, weights_only=True)["state_dict"]
    official = {name: value for name, value in official.items() if "visual_tokenizer" not in name}
    again = torch.load(tmp_path / "again.ckpt", weights_only=True)
    assert list(again) == ["state_dict"]
    assert set(again["state_dict"]) == set(official)
    assert all(torch.equal(again["state_dict"][name], value) for name, value in official.items())
