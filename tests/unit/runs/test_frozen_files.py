"""Digests of the files that give a run's targets their meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from m2_encoder.errors import CheckpointError, UserError
from m2_encoder.runs.folder import CONFIG_FILE, write_config
from m2_encoder.runs.frozen_files import FROZEN_FILE, check_frozen, digest_frozen, write_frozen


def _config(folder: Path, **given: Any) -> dict[str, Any]:
    """A run with a SentencePiece file, a named teacher and a visual tokenizer."""
    (folder / "codes").mkdir(exist_ok=True)
    for name in ("sp.model", "teacher.ckpt", "codes/model.safetensors"):
        if not (folder / name).exists():
            (folder / name).write_text(name)
    objectives: dict[str, Any] = {
        "itc": {"weight": 1.0},
        "distillation": {"teacher": "m2-encoder-1b", "teacher_weights": str(folder / "teacher.ckpt")},
        "cmim": {"weight": 1.0, "targets": {"tokenizer": str(folder / "codes")}},
    }
    return {"model": {"tokenizer": str(folder / "sp.model")}, "objective": objectives, **given}


def _begin(folder: Path, cfg: dict[str, Any]) -> Path:
    run = folder / "run"
    write_config(run / CONFIG_FILE, cfg)
    write_frozen(run, check_frozen(cfg, run, resumes=False), resumes=False)
    return run


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("sp.model", "model.tokenizer"),
        ("teacher.ckpt", "objective.distillation.teacher_weights"),
        ("codes/model.safetensors", "objective.cmim.targets.tokenizer"),
    ],
)
def test_another_content_is_refused_and_another_place_is_not(tmp_path: Path, file: str, key: str) -> None:
    cfg = _config(tmp_path)
    run = _begin(tmp_path, cfg)
    assert len(check_frozen(cfg, run, resumes=True)) == 3
    for name in ("sp.model", "teacher.ckpt", "codes"):
        (tmp_path / "moved").mkdir(exist_ok=True)
        (tmp_path / name).rename(tmp_path / "moved" / name)
    moved = _config(tmp_path / "moved")
    assert len(check_frozen(moved, run, resumes=True)) == 3
    (tmp_path / "moved" / file).write_text("trained anew")
    with pytest.raises(UserError) as caught:
        check_frozen(moved, run, resumes=True)
    said = str(caught.value)
    assert said.startswith(f"{key}={tmp_path}/moved/")
    assert str(tmp_path / file) in said
    assert said.endswith("restore that file, or give another run.name")
    assert len(check_frozen(moved, tmp_path / "other", resumes=False)) == 3


def test_what_no_run_reads_has_no_digest(tmp_path: Path) -> None:
    cfg = _config(tmp_path)
    cfg["objective"]["cmim"]["weight"] = 0
    cfg["objective"]["distillation"]["teacher_weights"] = "/no/file"
    cfg["model"]["tokenizer"] = "emoji"
    assert digest_frozen(cfg) == {}
    assert set(digest_frozen(_config(tmp_path, task={}))) == {
        "objective.distillation.teacher",
        "objective.cmim.targets.tokenizer",
    }


def test_objectives_may_come_and_come_back(tmp_path: Path) -> None:
    cfg = _config(tmp_path)
    alone = {**cfg, "objective": {"itc": {}}}
    run = _begin(tmp_path, alone)
    write_frozen(run, check_frozen(cfg, run, resumes=True), resumes=True)
    write_frozen(run, check_frozen(alone, run, resumes=True), resumes=True)
    (tmp_path / "teacher.ckpt").write_text("trained anew")
    with pytest.raises(UserError, match="teacher_weights"):
        check_frozen(cfg, run, resumes=True)


def test_a_new_run_forgets_what_an_earlier_one_read(tmp_path: Path) -> None:
    cfg = _config(tmp_path)
    run = _begin(tmp_path, cfg)
    bare = {"model": {"tokenizer": "emoji"}, "objective": {"itc": {}}}
    write_frozen(run, check_frozen(bare, run, resumes=False), resumes=False)
    assert not (run / FROZEN_FILE).exists()


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    cfg = _config(tmp_path)
    run = _begin(tmp_path, cfg)
    (run / FROZEN_FILE).write_text("[]")
    with pytest.raises(CheckpointError, match=r"frozen\.json: is damaged; restore it"):
        check_frozen(cfg, run, resumes=True)
