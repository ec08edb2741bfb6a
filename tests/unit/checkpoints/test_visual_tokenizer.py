from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from m2_encoder.checkpoints.visual_tokenizer import load_visual_tokenizer, save_visual_tokenizer
from m2_encoder.errors import CheckpointError
from m2_encoder.models.visual_tokenizer import VisualTokenizer, VisualTokenizerConfig


@pytest.fixture
def tokenizer() -> VisualTokenizer:
    config = VisualTokenizerConfig(
        image_size=16, patch_size=8, num_codes=9, code_dim=4, embed_dim=8, num_heads=2, num_layers=1
    )
    return VisualTokenizer(config).eval()


def test_what_is_saved_comes_back(tokenizer: VisualTokenizer, tmp_path: Path) -> None:
    folder = save_visual_tokenizer(tmp_path / "t", tokenizer, provenance={"run": "x"})
    again = load_visual_tokenizer(folder)
    assert again.config == tokenizer.config
    assert not again.training
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert {"codebook.vectors", "codebook.usage"} <= again.state_dict().keys()
    with pytest.raises(CheckpointError, match="already exists"):
        save_visual_tokenizer(folder, tokenizer)


def test_broken_folders_are_named(tokenizer: VisualTokenizer, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no visual tokenizer, which is a folder with"):
        load_visual_tokenizer(tmp_path)
    folder = save_visual_tokenizer(tmp_path / "t", tokenizer)
    config = folder / "config.json"
    content = json.loads(config.read_text())
    for broken, message in (
        ("{", "damaged or edited"),
        (json.dumps({**content, "format": "m2-encoders"}), "format 'm2-encoders' version 1, expected"),
        (json.dumps({**content, "tokenizer": {**content["tokenizer"], "num_codes": 8}}), "damaged or edited .*shape"),
        (json.dumps({**content, "tokenizer": {"image_size": 8}}), "damaged or edited"),
    ):
        config.write_text(broken)
        with pytest.raises(CheckpointError, match=message):
            load_visual_tokenizer(folder)
