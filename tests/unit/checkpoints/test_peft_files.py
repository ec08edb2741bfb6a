"""Adapters in peft's files: read back as written, refused for other weights, merged by `load`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from m2_encoder import load
from m2_encoder.checkpoints.export import export_model
from m2_encoder.checkpoints.peft_files import LoraAdapter, digest_base, read_adapter, write_adapter
from m2_encoder.data.emoji.dataset import load_emoji_tokenizer_model
from m2_encoder.errors import CheckpointError
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tests.support.models import random_model, small_config

CONFIG = small_config(vocab_size=3500)
MODULES = ("backbone.layers.0.vision_expert.q_proj", "vl_encoder.layers.1.vision_expert.fc1")


def make_base() -> M2Encoder:
    torch.manual_seed(0)
    return random_model(CONFIG)


def make_adapter(base: M2Encoder, **changes: Any) -> LoraAdapter:
    torch.manual_seed(1)
    weights = {name: base.get_submodule(name).weight for name in MODULES}
    values: dict[str, Any] = {
        "rank": 3,
        "alpha": 6.0,
        "dropout": 0.1,
        "pairs": {
            name: (torch.randn(3, w.shape[1]) * 0.1, torch.randn(w.shape[0], 3) * 0.1) for name, w in weights.items()
        },
        "whole": {"vl_image_proj.weight": torch.randn(12, 16)},
        "scales": {"logit_scale": 1.25},
        "base": digest_base(base.state_dict(), without=["vl_image_proj.weight"]),
    }
    return LoraAdapter(**{**values, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_adapter(tmp_path, make_adapter(make_base()))
    return tmp_path


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=14)
    return export_model(tmp_path / "base", model=make_base(), tokenizer=tokenizer)


def test_read_back_as_written(folder: Path) -> None:
    written, found = make_adapter(make_base()), read_adapter(folder)
    assert (found.rank, found.alpha, found.dropout, found.base) == (3, 6.0, 0.1, written.base)
    assert found.scales == {"logit_scale": 1.25}
    assert found.pairs.keys() == written.pairs.keys()
    for name, pair in written.pairs.items():
        assert all(torch.equal(one, other) for one, other in zip(pair, found.pairs[name], strict=True))
    assert torch.equal(found.whole["vl_image_proj.weight"], written.whole["vl_image_proj.weight"])


def test_load_merges_it(folder: Path, exported: Path) -> None:
    adapter, base = make_adapter(make_base()), make_base().state_dict()
    merged = load(exported, adapter=folder).model.state_dict()
    for name, value in base.items():
        module = name.removesuffix(".weight")
        expected = value
        if module in adapter.pairs:
            down, up = adapter.pairs[module]
            expected = value + 2.0 * up @ down
        if name in adapter.whole:
            expected = adapter.whole[name]
        if name == "logit_scale":
            expected = torch.tensor(1.25)
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-6)


def other_weights(base: M2Encoder) -> None:
    with torch.no_grad():
        base.text_embed.tokens.weight[7, 3] += 1e-3


def test_other_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    base = make_base()
    other_weights(base)
    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=14)
    exported = export_model(tmp_path / "other", model=base, tokenizer=tokenizer)
    with pytest.raises(
        CheckpointError, match=r"adapter=.*: belongs to other weights: their SHA-256 is .*; give the base"
    ):
        load(exported, adapter=folder)


def test_another_size_is_refused(folder: Path, tmp_path: Path) -> None:
    tokenizer = SentencePieceTokenizer(load_emoji_tokenizer_model(), context_length=14)
    wide = random_model(small_config(vocab_size=3500, embed_dim=32))
    exported = export_model(tmp_path / "wide", model=wide, tokenizer=tokenizer)
    said = (
        r"is for another model: backbone.layers.0.vision_expert.q_proj is \(16, 16\) there, which this one has as \(32"
    )
    with pytest.raises(CheckpointError, match=said):
        load(exported, adapter=folder)


def rename(tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name.replace("lora_A", "lora_embedding_A")] = tensors.pop(name)


def spoil(tensors: dict[str, Tensor]) -> None:
    next(iter(tensors.values()))[0] = float("nan")


def forget(tensors: dict[str, Tensor]) -> None:
    tensors.clear()


@pytest.mark.parametrize(
    ("change", "damage", "said"),
    [
        ({"use_dora": True}, None, r"use_dora=True is not read, only plain LoRA"),
        ({"peft_type": "IA3"}, None, r"peft_type=IA3 is not read"),
        ({"bias": "all"}, None, r"bias=all is not read"),
        ({"r": 4}, None, r"damaged: r=4 and lora_alpha=6 do not fit its matrices"),
        ({}, rename, r"without its other half|is not read"),
        ({}, spoil, r"holds values that are NaN or infinite"),
        ({}, forget, r"holds no low-rank update"),
    ],
)
def test_what_is_no_plain_adapter_is_refused(
    folder: Path, change: dict[str, Any], damage: Callable[[dict[str, Tensor]], None] | None, said: str
) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    if damage is not None:
        tensors = load_file(folder / "adapter_model.safetensors")
        damage(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=said):
        read_adapter(folder)


def test_a_folder_without_one(tmp_path: Path, exported: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter=.*: no adapter: there is no adapter_config.json; m2-export"):
        load(exported, adapter=tmp_path)


def test_a_cut_file_is_refused(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"damaged"):
        read_adapter(folder)
