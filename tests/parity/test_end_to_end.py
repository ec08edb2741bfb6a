"""Image files and strings in, official features and probabilities out, through the public functions alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from m2_encoder import LoadedModel, M2EncoderConfig, load
from tests.support.closeness import assert_close_in_ulps

FEATURES = 1e-5


@pytest.fixture(scope="module")
def inputs(parity_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((parity_dir / "end_to_end" / "inputs.json").read_text("utf-8"))
    return content


@pytest.fixture(scope="module")
def expected(parity_dir: Path) -> dict[str, Tensor]:
    return load_file(parity_dir / "end_to_end" / "expected.safetensors")


def _token_table(rows: int, width: int) -> Tensor:
    """The table that the fixtures leave out: a formula, in fp64, rounded to fp32."""
    i = torch.arange(rows, dtype=torch.float64)[:, None]
    j = torch.arange(width, dtype=torch.float64)[None, :]
    return (0.7 * torch.sin(0.6180339887 * i * (j + 1) + j)).float()


@pytest.fixture(scope="module")
def loaded(parity_dir: Path, inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = parity_dir / "end_to_end"
    config = M2EncoderConfig.from_official((folder / "config.json").read_text())
    weights = load_file(folder / "weights_without_token_table.safetensors")
    table = _token_table(config.vocab_size, config.embed_dim)
    sample = torch.tensor(inputs["token_table_row_0_to_3_col_0_to_3"])
    assert_close_in_ulps(table[:4, :4], sample)
    path = tmp_path_factory.mktemp("end_to_end") / "weights.safetensors"
    save_file({**weights, "backbone.text_embed.weight": table}, path)
    return load(config, weights=path, tokenizer=parity_dir / "tokenizer" / "sp.model")


def test_images(loaded: LoadedModel, parity_dir: Path, inputs: dict[str, Any], expected: dict[str, Tensor]) -> None:
    images = torch.stack([loaded.preprocess(parity_dir / "images" / name) for name in inputs["images"]])
    features = loaded.model.encode_image(images)
    torch.testing.assert_close(features, expected["image_features"], rtol=0, atol=FEATURES)
    assert not features.requires_grad


def test_texts(loaded: LoadedModel, inputs: dict[str, Any], expected: dict[str, Tensor]) -> None:
    texts = inputs["texts"]
    features = loaded.model.encode_text(loaded.tokenizer(texts))
    torch.testing.assert_close(features, expected["text_features"], rtol=0, atol=FEATURES)
    one_by_one = torch.cat([loaded.model.encode_text(loaded.tokenizer(text)) for text in texts])
    torch.testing.assert_close(one_by_one, expected["text_features"], rtol=0, atol=FEATURES)


def test_probabilities(
    loaded: LoadedModel, parity_dir: Path, inputs: dict[str, Any], expected: dict[str, Tensor]
) -> None:
    model, preprocess, tokenizer = loaded
    images = torch.stack([preprocess(parity_dir / "images" / name) for name in inputs["images"]])
    logits = model.similarity(model.encode_image(images), model.encode_text(tokenizer(inputs["texts"])))
    torch.testing.assert_close(logits.softmax(dim=-1), expected["probs"], rtol=0, atol=FEATURES)
