"""The way of a new user: photographs with captions, packed, looked at, trained on, and refused where that is better."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageDraw

import m2_encoder
from m2_encoder.cli import data as data_command
from m2_encoder.cli import train as train_command
from m2_encoder.data import webdataset_module
from m2_encoder.data.inspect.start_check import check_manifest
from m2_encoder.runs import loggers

COLORS = {"red": "红色", "green": "绿色", "blue": "蓝色", "orange": "橙色"}
SMALL = (
    "model=tiny", "model.embed_dim=32", "model.num_heads=2", "model.num_layers=2", "model.feature_dim=16",
    "model.image_size=16", "trainer.accelerator=cpu", "trainer.max_steps=3", "trainer.log_every_n_steps=1",
    "scheduler.warmup_steps=0", "data=webdataset", "data.num_workers=0", "data.global_batch_size=16",
    "trainer.val_check_interval=3",
)  # fmt: skip


class Outcome(NamedTuple):
    """What a command printed and ended with."""

    code: int
    out: str
    err: str


Start = Callable[..., Outcome]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Start:
    """Runs m2-data or m2-train in a scratch folder."""
    monkeypatch.chdir(tmp_path)
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "TORCHELASTIC_RUN_ID", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(variable, raising=False)

    def run(*argv: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", list(argv))
        code = {"m2-data": data_command, "m2-train": train_command}[argv[0]].main()
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def _draw(folder: Path, count: int, *, first: int = 0) -> None:
    """Pictures of rectangles: half of them with a .txt in one language, half with a .json in both."""
    folder.mkdir()
    for number in range(first, first + count):
        rng = np.random.default_rng(number)
        name, chinese = list(COLORS.items())[number % len(COLORS)]
        picture = Image.new("RGB", (int(rng.integers(40, 120)), int(rng.integers(40, 120))), "white")
        x, y = (int(value) for value in rng.integers(0, 30, 2))
        ImageDraw.Draw(picture).rectangle((x, y, x + 9, y + 9), fill=name)
        picture.save(folder / f"{number:04d}.jpg")
        english, mandarin = f"a {name} rectangle at {x}, {y}", f"位于 {x}, {y} 的{chinese}矩形"
        if number % 2 or first:
            captions = {"captions": {"en": [english], "zh": [mandarin]}}
            (folder / f"{number:04d}.json").write_text(json.dumps(captions), encoding="utf-8")
        else:
            (folder / f"{number:04d}.txt").write_text(mandarin if number % 4 else english, encoding="utf-8")


def test_from_photographs_to_a_model(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _draw(tmp_path / "photos", 200)
    _draw(tmp_path / "other", 12, first=1000)
    assert start("m2-data", "pack", "source=photos", "output=tars", "samples_per_shard=50", "workers=0").code == 0
    assert start("m2-data", "pack", "source=other", "output=val", "workers=0").code == 0
    looked = start("m2-data", "check", "source=tars", "workers=0")
    assert looked.code == 0
    assert "usable samples  200" in looked.out

    trained = start("m2-train", *SMALL, "data.sources.main.shards=tars", "+data.validation.my=val", "run.name=own")
    assert trained.code == 0, trained.err
    assert " main " in trained.out
    assert trained.out.index(" main ") < trained.out.index("run own: 3 steps"), "the look comes first"
    run = tmp_path / "outputs" / "own"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("val/my_zh/mean_recall" in line and "val/my_en/t2i_r@1" in line for line in metrics)
    found = json.loads((run / "data_check.json").read_text(encoding="utf-8"))
    assert found["sources"]["main"]["usable"] == 200
    assert list(found["manifest"]) == ["source main"]
    assert m2_encoder.load(run / "export").model.config.embed_dim == 32

    looks: list[str] = []
    monkeypatch.setattr(
        webdataset_module, "check_manifest", lambda *a, **k: looks.append("look") or check_manifest(*a, **k)
    )
    again = ("data.sources.main.shards=tars", "run.name=own", "run.resume=must", "+data.validation.my=val")
    continued = start("m2-train", *SMALL, *again, "trainer.max_steps=4")
    assert continued.code == 0, continued.err
    assert not looks, "the same sources were looked at when the run began"
    assert "own: continuing at step 3 of 4" in continued.out


@pytest.mark.slow
def test_a_refused_run_leaves_things_as_they_were(start: Start, tmp_path: Path) -> None:
    """A source too small for its lanes or epochs leaves no folder; a run that may not go on so keeps its settings."""
    _draw(tmp_path / "photos", 100)
    assert start("m2-data", "pack", "source=photos", "output=tars", "workers=0").code == 0
    own = (*SMALL, "data.sources.main.shards=tars", "run.export=false", "logger=csv")
    small = start("m2-train", *own, "run.name=own", "data.lanes=128")
    assert (small.code, "data.lanes=128 exceeds the samples of a source" in small.err) == (2, True)
    often = start("m2-train", *own, "run.name=own", "data.sources.main.max_epochs=1", "trainer.max_steps=7")
    assert (often.code, "draws 112 samples of its 100, more than max_epochs=1" in often.err) == (2, True)
    assert start("m2-train", *own, "run.name=own").code == 0, "no run is there"
    config = (tmp_path / "outputs" / "own" / "config.yaml").read_bytes()
    go_on = ("run.name=own", "run.resume=must", "trainer.max_steps=4")
    for _ in range(2):
        other = start("m2-train", *own, *go_on, "data.sources.main.max_samples=99")
        assert other.code == 2
        assert "data.sources.main.max_samples: None then, 99 now" in other.out
        assert "the checkpoint was trained on another mixture" in other.err
        assert (tmp_path / "outputs" / "own" / "config.yaml").read_bytes() == config
    assert start("m2-train", *own, *go_on).code == 0


def test_a_pointless_run_leaves_nothing_behind(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every caption the same: refused before W&B, the model or the run's folder."""
    _draw(tmp_path / "photos", 60)
    for path in tmp_path.glob("photos/*.json"):
        path.unlink()
    for path in tmp_path.glob("photos/*.jpg"):
        path.with_suffix(".txt").write_text("IMG", encoding="utf-8")
    assert start("m2-data", "pack", "source=photos", "output=tars", "workers=0").code == 0

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("started although the run is pointless")

    monkeypatch.setattr(loggers, "build_wandb_logger", refuse)
    monkeypatch.setattr("m2_encoder.runs.run.build_trainer", refuse)
    ended = start("m2-train", *SMALL, "data.sources.main.shards=tars", "run.name=vain")
    assert ended.code == 2
    assert ended.err.splitlines() == [
        "m2-train: data.sources.main: all captions are the same ('IMG'): nothing to learn from; check which column was "
        "packed as caption"
    ]
    assert "false neg." not in ended.out, "a table beside the one line"
    assert not list((tmp_path / "outputs").rglob("*.json*"))
    assert start("m2-train", *SMALL, "data.sources.main.shards=tars", "run.name=vain").code == 2, "no run is there"


def test_the_look_can_be_switched_off(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _draw(tmp_path / "photos", 70)
    assert start("m2-data", "pack", "source=photos", "output=tars", "workers=0").code == 0
    monkeypatch.setattr(webdataset_module, "check_manifest", lambda *_a, **_k: pytest.fail("looked"))
    values = ("data.sources.main.shards=tars", "data.check=null", "run.name=blind", "run.export=false")
    ended = start("m2-train", *SMALL, *values)
    assert ended.code == 0, ended.err
    assert not (tmp_path / "outputs" / "blind" / "data_check.json").exists()


def test_a_tokenizer_is_asked_for_where_the_model_has_none(start: Start, tmp_path: Path) -> None:
    _draw(tmp_path / "photos", 4)
    assert start("m2-data", "pack", "source=photos", "output=tars", "workers=0").code == 0
    named = [*SMALL, "data.sources.main.shards=tars", "model=m2_encoder_0_4b"]
    ended = start("m2-train", *[value for value in named if value != "model=tiny"])
    assert ended.code == 2
    assert "model.tokenizer=FILE (the SentencePiece model of the weights, such as the official sp.model)" in ended.err
