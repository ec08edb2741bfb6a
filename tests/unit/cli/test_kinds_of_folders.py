"""Encoders and visual tokenizers are both folders of a run; one in place of the other is said, with its key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from m2_encoder.checkpoints.exported import read_exported
from m2_encoder.checkpoints.visual_tokenizer import load_visual_tokenizer, save_visual_tokenizer
from m2_encoder.config import validate
from m2_encoder.config.compose import open_composer
from m2_encoder.config.model_choice import model_problems
from m2_encoder.config.problems import format_problem
from m2_encoder.errors import CheckpointError, Problem, UserError
from m2_encoder.models.visual_tokenizer import VisualTokenizer, VisualTokenizerConfig
from m2_encoder.runs.build import build_objectives

Problems = Callable[..., list[str]]
TOKENIZER, TEACHER = "objective.cmim.targets.tokenizer", "objective.distillation.teacher"


@pytest.fixture
def problems(repo_root: Path, tmp_path: Path) -> Problems:
    def find(*lines: str) -> list[str]:
        with open_composer(repo_root / "conf", "train") as composer:
            composition = composer.compose(
                [*lines, "logger=csv", "trainer.accelerator=cpu", f"run.folder={tmp_path / 'outputs'}"]
            )
        found = [*composition.problems, *validate.validate_train(composition.cfg)]
        return [format_problem(problem) for problem in composition.without_echoes(found)]

    return find


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    config = VisualTokenizerConfig(image_size=32, patch_size=8, num_codes=5, code_dim=4, embed_dim=8, num_heads=2)
    return save_visual_tokenizer(tmp_path / "v" / "export", VisualTokenizer(config))


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    folder = tmp_path / "e" / "export"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "tokenizer.model"):
        (folder / name).touch()
    (folder / "config.json").write_text(json.dumps({"format": "m2-encoder", "format_version": 1}))
    return folder


def test_a_visual_tokenizer_is_no_encoder(problems: Problems, tokenizer: Path) -> None:
    rule = "is a visual tokenizer, not an encoder; give a folder that m2-export wrote"
    for given in (tokenizer, tokenizer.parent):
        assert problems("objective=[itc,distillation]", f"{TEACHER}={given}") == [f"{TEACHER}={given}: {rule}"]
        cfg = {"model": str(given), "weights": None, "tokenizer": None, "device": "cpu"}
        assert model_problems(cfg) == [Problem("model", str(given), rule)]
    with pytest.raises(CheckpointError, match=rule):
        read_exported(tokenizer)


def test_an_encoder_is_no_visual_tokenizer(problems: Problems, encoder: Path) -> None:
    rule = "is an encoder, not a visual tokenizer; train one with m2-train +experiment=visual_tokenizer"
    for given in (encoder, encoder.parent):
        (problem,) = problems("objective=[itc,cmim_codes]", f"{TOKENIZER}={given}")
        assert problem.startswith(f"{TOKENIZER}={given}: {rule}")
    with pytest.raises(CheckpointError, match="is an encoder, not a visual tokenizer"):
        load_visual_tokenizer(encoder)


def test_the_folder_of_a_run_holds_its_tokenizer_in_export(problems: Problems, tokenizer: Path, tmp_path: Path) -> None:
    run = tokenizer.parent
    assert problems("objective=[itc,cmim_codes]", f"{TOKENIZER}={run}") == [
        f"{TOKENIZER}={run}: no folder with a visual tokenizer; use {TOKENIZER}={run}/export"
    ]
    (tmp_path / "empty").mkdir()
    (problem,) = problems("objective=[itc,cmim_codes]", f"{TOKENIZER}={tmp_path / 'empty'}")
    assert "no folder with a visual tokenizer; train one with m2-train +experiment=visual_tokenizer" in problem


def test_damaged_folders_are_named_with_their_key(tokenizer: Path, encoder: Path) -> None:
    (tokenizer / "config.json").write_text("{")
    model = {"name": "tiny", "tokenizer": "emoji"}
    targets = {"_target_": "m2_encoder.objectives.patch_targets.VisualCodes", "tokenizer": str(tokenizer)}
    codes = {"_target_": "m2_encoder.objectives.masked_image.MaskedImage", "targets": targets}
    with pytest.raises(UserError, match=rf"^{TOKENIZER}={tokenizer}: .*damaged or edited"):
        build_objectives({"model": model, "objective": {"cmim": codes}})
    teaching = {"_target_": "m2_encoder.objectives.distillation.Distillation", "teacher": str(encoder)}
    with pytest.raises(UserError, match=rf"^{TEACHER}={encoder}: .*damaged or edited"):
        build_objectives({"model": model, "objective": {"distillation": teaching}})
