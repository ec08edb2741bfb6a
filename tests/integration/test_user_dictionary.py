"""More words for jieba, from the command line to the masks."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.cli import train as train_command
from m2_encoder.config.model_choice import build_model_config, build_tokenizer
from m2_encoder.data.masking.batch_masking import build_masking
from m2_encoder.runs.build import build_objectives

KEY = "objective.cmlm.user_dictionary"


def test_paths_may_hold_spaces_signs_and_chinese(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo_root: Path
) -> None:
    path = tmp_path / "词 典" / "a=b.txt"
    path.parent.mkdir()
    path.write_text("红色的苹果\n", encoding="utf-8")
    seen: list[dict[str, Any]] = []
    monkeypatch.chdir(repo_root)
    monkeypatch.setattr("m2_encoder.runs.run.train", seen.append)
    lines = ["+experiment=smoke", "objective=[itc,cmlm]", f"{KEY}={path}", f"run.folder={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["m2-train", *lines])
    assert train_command.main() == 0
    assert seen[0]["objective"]["cmlm"]["user_dictionary"] == str(path)


def test_its_words_are_masked_whole_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo_root: Path
) -> None:
    """A relative path counts from the working directory, and from the checkout where nothing is there."""
    checkout = tmp_path / "checkout"
    (checkout / "src" / "m2_encoder").mkdir(parents=True)
    (checkout / "conf").mkdir()
    shutil.copy(repo_root / "conf" / "train.yaml", checkout / "conf")
    (checkout / "words.txt").write_text("红色的苹果\n", encoding="utf-8")
    monkeypatch.chdir(checkout / "src")
    model = {"name": "tiny", "tokenizer": "emoji"}
    config = build_model_config(model)
    node = {"_target_": "m2_encoder.objectives.masked_language.MaskedLanguage", "user_dictionary": "words.txt"}
    objectives = build_objectives({"model": model, "objective": {"cmlm": node}})
    masking = build_masking(objectives, build_tokenizer(model, config), config)
    assert masking is not None
    _, masked = masking.mask_texts(["红色的苹果"] * 20, [(0, row) for row in range(20)])
    assert {tuple(set(row[2:-1])) for row in masked.predicted.tolist()} == {(True,)}
