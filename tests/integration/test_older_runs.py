"""What an older version wrote goes on and repeats: its checkpoint, and its `config.yaml` with names that have moved.

`tests/data/older_run` was written by revision 49ade2f: three steps, of which the checkpoint holds two. The fourth is of
today: the learning rate of the third, the first after the checkpoint, follows the longer schedule now. So are the
recalls: a caption that several drawings share is one query, it was one per drawing.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.cli import train as train_command
from tests.support.training import LIGHTNING_WARNINGS

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

OLDER = Path(__file__).parents[1] / "data" / "older_run"


def _read(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in record.items() if not name.startswith("perf/")} for record in records]


def _agree(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """The same names, among newer ones; the same numbers, as far as another processor computes them."""
    for record, wanted in zip(found, expected, strict=True):
        assert [name for name in record if name in wanted] == list(wanted)
        for name, value in wanted.items():
            recall = name.startswith("val/")  # one image may change its place
            assert record[name] == pytest.approx(value, rel=1e-4, abs=0.2 if recall else 1e-6), name


def test_checkpoint_of_an_older_version_goes_on(
    repo_root: Path, emoji_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "old"
    shutil.copytree(OLDER, run)
    expected = _read(OLDER / "metrics.jsonl")
    (run / "metrics.jsonl").write_text("".join((OLDER / "metrics.jsonl").read_text().splitlines(True)[:2]))
    monkeypatch.chdir(repo_root)
    arguments = [
        "+experiment=smoke", "objective=[itc,cmlm]", "objective.cmlm.schedule=[[0,0],[2,1]]", "model.image_size=16",
        "model.patch_size=8", "model.embed_dim=8", "model.num_heads=1", "model.feature_dim=8", "model.num_layers=1",
        "data.global_batch_size=8", "scheduler.warmup_steps=1", "trainer.val_check_interval=2", "run.export=false",
        f"run.folder={tmp_path}", "run.name=old", f"data.folder={emoji_folder}", "run.resume=must",
        "trainer.max_steps=4",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["m2-train", *arguments])
    assert train_command.main() == 0
    _agree(_read(run / "metrics.jsonl"), expected)


def test_configuration_of_an_older_version_repeats(
    repo_root: Path, emoji_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapping as schedule, and classes that have moved since."""
    monkeypatch.chdir(repo_root)
    arguments = [
        "--config-path", str(OLDER), "--config-name", "config", f"run.folder={tmp_path}", "run.name=again",
        f"data.folder={emoji_folder}",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["m2-train", *arguments])
    assert train_command.main() == 0
    _agree(_read(tmp_path / "again" / "metrics.jsonl"), _read(OLDER / "metrics.jsonl")[:2])
