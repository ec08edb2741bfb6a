"""Weights to start from, and the tokenizer that a run gives them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from m2_encoder.checkpoints.export import export_model
from m2_encoder.checkpoints.vocabulary import TOKEN_TABLE
from m2_encoder.config.compose import Composer, open_composer
from m2_encoder.config.model_choice import build_model_config, build_tokenizer
from m2_encoder.errors import UserError
from m2_encoder.models.m2_encoder import M2Encoder
from m2_encoder.runs.build import build_module, build_objectives
from m2_encoder.runs.export import read_trained
from m2_encoder.runs.folder import LAST_CHECKPOINT, write_config
from m2_encoder.runs.resume import check_resume
from m2_encoder.tokenizers.training import train_tokenizer

SMALL = ("+experiment=smoke", "model.patch_size=8", "logger=csv", "run.name=r")
TEXTS = [f"a {colour} {thing}" for colour in ("red", "blue", "green") for thing in ("cat", "fish", "mountain")]


@pytest.fixture(scope="module")
def composer(repo_root: Path) -> Iterator[Composer]:
    with open_composer(repo_root / "conf", "train") as opened:
        yield opened


@pytest.fixture
def other(tmp_path: Path) -> Path:
    (tmp_path / "other.model").write_bytes(train_tokenizer(TEXTS, vocab_size=291))
    return tmp_path / "other.model"


def _build(composer: Composer, *lines: str) -> tuple[dict[str, Any], Any]:
    cfg = composer.compose([*SMALL, *lines]).cfg
    return cfg, build_module(cfg, build_objectives(cfg), validation_name="val")


def test_weights_want_their_tokenizer_or_are_mapped(composer: Composer, tmp_path: Path, other: Path) -> None:
    cfg = composer.compose([*SMALL]).cfg
    config = build_model_config(cfg["model"])
    tokenizer = build_tokenizer(cfg["model"], config)
    export_model(tmp_path / "own", model=M2Encoder(config), tokenizer=tokenizer)
    _, module = _build(composer, f"model.weights={tmp_path / 'own'}")
    assert module._initial_state[TOKEN_TABLE].shape[0] == tokenizer.vocab_size
    lines = (f"model.weights={tmp_path / 'own'}", f"model.tokenizer={other}", "model.vocab_size=291")
    with pytest.raises(UserError, match=r"291 pieces.* is not that of the weights .*model\.map_tokenizer=true"):
        _build(composer, *lines)
    _, module = _build(composer, *lines, "model.map_tokenizer=true")
    assert module._initial_state[TOKEN_TABLE].shape[0] == 291


def test_checkpoints_hold_their_tokenizer(composer: Composer, tmp_path: Path, other: Path) -> None:
    where = (f"run.folder={tmp_path}", f"model.tokenizer={other}", "model.vocab_size=291")
    cfg, module = _build(composer, *where)
    write_config(tmp_path / "r" / "config.yaml", cfg)
    module.configure_model()
    content = {"global_step": 1, "state_dict": module.state_dict(), "optimizer_states": []}
    module.on_save_checkpoint(content)
    checkpoint = tmp_path / "r" / LAST_CHECKPOINT
    checkpoint.parent.mkdir(exist_ok=True)
    torch.save(content, checkpoint)
    assert torch.load(checkpoint, weights_only=True)["tokenizer"]["file"].numpy().tobytes() == other.read_bytes()
    read_trained(cfg, checkpoint)
    other.write_bytes(train_tokenizer([*TEXTS, "a red cat"], vocab_size=291))  # the same name and size
    with pytest.raises(UserError, match="is not that of the weights"):
        read_trained(cfg, checkpoint)
    cfg, module = _build(composer, *where)
    with pytest.raises(UserError, match="is not that of the weights") as caught:
        check_resume(module, cfg, tmp_path / "r", checkpoint)
    assert caught.value.key == "model.tokenizer"
