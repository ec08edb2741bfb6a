"""`frozen.json`: the files that give a run's targets their meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.errors import CheckpointError, UserError
from m2_encoder.runs import folder
from m2_encoder.runs.folder import CONFIG_FILE, FROZEN_FILE, check_frozen, find_frozen, write_config, write_frozen

DISTILLATION = "m2_encoder.objectives.distillation.Distillation"
CODES = "m2_encoder.objectives.patch_targets.VisualCodes"


def _config(place: Path, **given: Any) -> dict[str, Any]:
    """A run with a SentencePiece file, a named teacher and a visual tokenizer."""
    (place / "codes").mkdir(exist_ok=True)
    for name in ("sp.model", "teacher.ckpt", "codes/model.safetensors"):
        if not (place / name).exists():
            (place / name).write_text(name)
    weights = str(place / "teacher.ckpt")
    objectives: dict[str, Any] = {
        "itc": {"weight": 1.0},
        "distillation": {
            "_target_": DISTILLATION,
            "teacher": "m2-encoder-1b",
            "teacher_weights": weights,
        },
        "cmim": {"weight": 1.0, "targets": {"_target_": CODES, "tokenizer": str(place / "codes")}},
    }
    return {"model": {"tokenizer": str(place / "sp.model")}, "objective": objectives, **given}


def _begin(place: Path, cfg: dict[str, Any]) -> Path:
    run = place / "run"
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
    assert find_frozen(cfg) == {}
    assert set(find_frozen(_config(tmp_path, task={}))) == {
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


def test_of_large_files_samples_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "WHOLE_BYTES", 3)
    monkeypatch.setattr(folder, "_SAMPLE_BYTES", 4)
    cfg = _config(tmp_path)
    weights = tmp_path / "teacher.ckpt"
    weights.write_bytes(bytes(range(200)))
    run = _begin(tmp_path, cfg)
    assert "size" in json.loads((run / FROZEN_FILE).read_text())["objective.distillation.teacher"]
    check_frozen(cfg, run, resumes=True)
    for other in (bytes(range(199)), bytes(199) + b"a", b"a" + bytes(range(1, 200))):
        weights.write_bytes(other)
        with pytest.raises(UserError, match="is not the file that this run began with"):
            check_frozen(cfg, run, resumes=True)


def test_records_that_digest_large_files_whole_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = _config(tmp_path)
    run = _begin(tmp_path, cfg)
    monkeypatch.setattr(folder, "WHOLE_BYTES", 3)
    write_frozen(run, check_frozen(cfg, run, resumes=True), resumes=True)
    check_frozen(cfg, run, resumes=True)
    (tmp_path / "teacher.ckpt").write_text("trained anew")
    with pytest.raises(UserError, match="teacher_weights"):
        check_frozen(cfg, run, resumes=True)
