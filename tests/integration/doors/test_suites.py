"""Suites in runs of m2-train: at validations, watched by others, at the end, and refused before a step is trained."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from PIL import Image

from m2_encoder.runs.loggers import forget_service
from tests.integration.doors.conftest import Train
from tests.support.suites import captioned
from tests.support.wandb_file import read_page

LOOP = ("trainer.limit_val_batches=1", "trainer.max_steps=4", "run.export=false")


def _suite(folder: Path) -> list[str]:
    return ["evaluation=[own]", f"evaluation.own.sets.own.path={folder}"]


def _lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_measured_at_validations_watched_and_at_the_end(m2_train: Train, tmp_path: Path) -> None:
    found = _suite(captioned(tmp_path / "set", 6))
    watched = "callbacks.best_checkpoint.monitor=eval/own_zh/mean_recall"
    run = m2_train(*found, *LOOP, "callbacks=[default,suites,best_checkpoint]", watched)
    name = "eval/own_zh/mean_recall"
    measured = {line["step"]: line[name] for line in _lines(run) if name in line}
    assert sorted(measured) == [2, 4]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["best_checkpoint"]["step"] in measured
    wanted = {"dataset": "own", "language": "zh", "metric": "mean_recall"}
    (recall,) = (each["value"] for each in summary["records"] if wanted.items() <= each.items())
    assert recall == pytest.approx(measured[4]), "the same model, by itself and in the loop"
    assert "| own | zh |" in (run / "results.md").read_text(encoding="utf-8")


def test_tables_and_galleries_reach_wandb(m2_train: Train, tmp_path: Path) -> None:
    found = _suite(captioned(tmp_path / "set", 6))
    run = m2_train(*found, *LOOP, "callbacks=[default,suites]", "logger=wandb")
    forget_service()  # which writes the last of it
    (place,) = (run / "wandb").glob("offline-run-*")
    page = read_page(place)
    tables = {name: table for name, table in page.tables.items() if name.startswith("eval/own/")}
    assert any(row[:2] == ["own", "zh"] for table in tables.values() for row in table["data"])
    for language in ("zh", "en"):
        for which in ("best", "worst"):
            name = f"eval/own_{language}/{which}"
            rows = [row[name] for row in page.history if name in row]
            assert len(rows) == 2, "at both validations"
            (caption, *_) = rows[-1]["captions"]
            assert re.fullmatch(r".+ \(rank \d of 6\)", caption)
            with Image.open(place / "files" / rows[-1]["filenames"][0]) as strip:
                assert strip.height == 96
                assert strip.width > 5 * 96


def test_every_second_validation(m2_train: Train, tmp_path: Path) -> None:
    found = _suite(captioned(tmp_path / "set", 3))
    run = m2_train(*found, *LOOP, "callbacks=[default,suites]", "callbacks.suites.every_n_validations=2")
    assert [line["step"] for line in _lines(run) if "eval/own_en/mean_recall" in line] == [4]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("evaluation=[retrieval]",), "callbacks.suites.suites: evaluation has no suite"),
        (("callbacks.suites.suites=[emoji]",), "callbacks.suites.suites: 'emoji' is no suite of this run"),
        (("evaluation.own.sets.own.path=/nowhere",), "/nowhere"),
        (
            ("strategy=grouped_fsdp", "trainer.accelerator=cpu"),
            "callbacks.suites: cannot measure weights that are split",
        ),
    ],
)
def test_refused_before_a_step(
    lines: tuple[str, ...], said: str, m2_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK"):  # a strategy sets them
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    found = [] if any(line.startswith("evaluation=") for line in lines) else _suite(captioned(tmp_path / "set", 3))
    run = m2_train(*found, *LOOP, "callbacks=[default,suites]", *lines, code=2)
    if dist.is_initialized():  # by the strategy of split weights
        dist.destroy_process_group()
    assert said in capsys.readouterr().err
    assert not (run / "checkpoints").exists()


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(tmp_path: Path, emoji_folder: Path, repo_root: Path) -> None:
    found = _suite(captioned(tmp_path / "set", 7))
    ranks = ("strategy=grouped_ddp", "trainer.accelerator=cpu", "logger=csv", "scheduler.warmup_steps=0")
    places = (f"run.folder={tmp_path}", f"data.folder={emoji_folder}", "trainer.val_check_interval=2")
    more = ("+experiment=smoke", "callbacks=[default,suites]", *LOOP, *ranks, *places, *found)
    measured = []
    for world in (1, 2):
        own = (f"run.name=w{world}", f"trainer.devices={world}")
        command = [sys.executable, "-m", "m2_encoder.cli.train", *more, *own]
        done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        lines = _lines(tmp_path / f"w{world}")
        measured.append([[v for k, v in line.items() if k.startswith("eval/") and "r@" in k] for line in lines])
    assert measured[0] == measured[1]
    assert any(measured[0])
