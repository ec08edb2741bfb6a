"""Pixels of the official evaluation transform."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from m2_encoder.data.images.transforms import EvalTransform, open_image

JPEG_LEVELS = 2  # decoders may differ by a level, and bicubic weights can add one


@pytest.fixture(scope="module")
def folder(parity_dir: Path) -> Path:
    return parity_dir / "images"


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))["files"]
    assert len(index) == 11
    return index


@pytest.fixture(scope="module")
def goldens(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "transform_golden.safetensors")


@pytest.mark.parametrize("image_size", [64, 224])
def test_every_file_at_both_sizes(
    folder: Path, files: dict[str, Any], goldens: dict[str, Tensor], image_size: int
) -> None:
    transform = EvalTransform(image_size)
    for file, facts in files.items():
        expected = goldens[f"{facts['key']}.resized_u8.{image_size}"].int()
        levels = transform.to_uint8(folder / file)
        assert levels.shape == (3, image_size, image_size)
        allowed = JPEG_LEVELS if file.endswith(".jpg") else 0
        assert int((levels.int() - expected).abs().max()) <= allowed, file
        # The official tensor is the resized image divided by 255, to the last bit.
        assert torch.equal(transform(folder / file), levels.float() / 255), file


def test_float_output(folder: Path, files: dict[str, Any], goldens: dict[str, Tensor]) -> None:
    compared = 0
    for file, facts in files.items():
        key = f"{facts['key']}.transform.64"
        if key in goldens:
            atol = JPEG_LEVELS / 255 if file.endswith(".jpg") else 0.0
            torch.testing.assert_close(EvalTransform(64)(folder / file), goldens[key], rtol=0, atol=atol)
            compared += 1
    assert compared == 2


def test_every_way_to_give_an_image_is_the_same(folder: Path, files: dict[str, Any]) -> None:
    transform = EvalTransform(64)
    for file, facts in files.items():
        expected = transform.to_uint8(folder / file)
        content = (folder / file).read_bytes()
        with Image.open(folder / file) as image:
            assert [image.mode, list(image.size)] == [facts["mode"], facts["size_wh"]]
            sources = [str(folder / file), content, image, np.asarray(open_image(folder / file))]
            for source in sources:
                assert torch.equal(transform.to_uint8(source), expected), file


def test_exif_orientation_is_an_option(folder: Path) -> None:
    ignored = open_image(folder / "exif_rot90.jpg")
    honoured = open_image(folder / "exif_rot90.jpg", honor_exif=True)
    assert ignored.size == (80, 40)
    assert honoured.size == (40, 80)
    # Orientation 6: the top of the scene is the left side of the stored pixels.
    assert np.array_equal(np.asarray(honoured), np.rot90(np.asarray(ignored), k=-1))
    upright = EvalTransform(64, honor_exif=True).to_uint8(folder / "exif_rot90.jpg")
    assert not torch.equal(upright, EvalTransform(64).to_uint8(folder / "exif_rot90.jpg"))
