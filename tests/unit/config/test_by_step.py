"""Mappings by step on the command line take the place of those that are there, in whatever way they are given."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from m2_encoder.cli import train as train_command
from m2_encoder.config.by_step import replace_by_step

KEY = "objective.soft_targets.softness"
CFG = {"objective": {"soft_targets": {"softness": {0: 0.0, 500: 0.2}}, "itm": {"schedule": None}}}


@pytest.fixture(autouse=True)
def _place(monkeypatch: pytest.MonkeyPatch, repo_root: Path) -> None:
    monkeypatch.chdir(repo_root)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


@pytest.mark.parametrize(
    "line",
    [
        f"{KEY}={{0: 0.1}}",
        f"++{KEY}={{ 0: 0.1}}",
        f"{KEY}=0.3,{{0: 0.1}}",
        f"{KEY}={{0: 0.1}},0.3",
        f"{KEY}=choice({{0: 0.1}},{{0: 0.3}})",
        "objective.soft_targets={weight: 2, softness: {0: 0.1}}",
    ],
)
def test_what_is_there_goes_first(line: str) -> None:
    # The sweeper keeps one override of a key, so that the two must not look alike.
    before = f"{KEY}=null" if line.startswith("++") else f"++{KEY}=null"
    assert replace_by_step(["seed=1", line], lambda _: [CFG]) == ["seed=1", before, line]


@pytest.mark.parametrize(
    "line",
    [
        f"{KEY}=0.3",
        f"{KEY}=[0, 1]",
        f"~{KEY}",
        f"+{KEY}={{5: 0.1}}",  # a plus adds to what is there
        "objective.itm.schedule={0: 0, 5: 1}",
        "objective.soft_targets={weight: 2}",
        f"{KEY}=range(1,3)",
        f"{KEY}={{0: ",
    ],
)
def test_other_lines_stay_alone(line: str) -> None:
    assert replace_by_step([line], lambda _: [CFG]) == [line]


def test_one_job_that_has_it_is_enough() -> None:
    assert replace_by_step([f"{KEY}={{0: 1}}"], lambda _: [{}, CFG]) == [f"++{KEY}=null", f"{KEY}={{0: 1}}"]


@pytest.mark.parametrize(
    "line", [f"{KEY}={{0: 0.1}}", "objective.soft_targets={softness: {0: 0.1}}", f"{KEY}={{7: 0.1, 9: 0.2}}"]
)
def test_what_is_shown_is_what_runs(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(train_command, "train", seen.append)
    lines = ["+experiment=r2d2", line, "logger=csv", f"run.folder={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["m2-train", *lines])
    assert train_command.main() == 0
    monkeypatch.setattr(sys, "argv", ["m2-train", *lines, "--cfg", "job"])
    assert train_command.main() == 0
    shown = yaml.safe_load(capsys.readouterr().out)["objective"]["soft_targets"]["softness"]
    assert shown == seen[0]["objective"]["soft_targets"]["softness"]
    assert 500 not in shown


@pytest.mark.parametrize("swept", ["0.3,{0: 0.1}", "{0: 0.1},0.3"])
def test_jobs_of_a_sweep_replace_it_and_are_named_by_it(
    swept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(train_command, "train", seen.append)
    lines = ["-m", "+experiment=r2d2", f"{KEY}={swept}", "objective.itm.schedule={0: 0, 5: 1}", "logger=csv"]
    monkeypatch.setattr(sys, "argv", ["m2-train", *lines, f"run.folder={tmp_path}", "hydra.sweep.dir=" + str(tmp_path)])
    assert train_command.main() == 0
    found = {cfg["run"]["name"]: cfg["objective"]["soft_targets"]["softness"] for cfg in seen}
    assert found == {"r2d2-soft_targets.softness=0.3": 0.3, "r2d2-soft_targets.softness=0-0.1": {0: 0.1}}


def test_swept_experiments_are_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\ndefaults: [r2d2]\nseed: 3\n", encoding="utf-8")
    monkeypatch.setattr(train_command, "train", seen.append)
    lines = ["-m", "--config-dir", str(own.parent), "+experiment=r2d2,mine", f"{KEY}=choice({{0: 0.1}})", "logger=csv"]
    monkeypatch.setattr(sys, "argv", ["m2-train", *lines, f"run.folder={tmp_path}", "hydra.sweep.dir=" + str(tmp_path)])
    assert train_command.main() == 0
    assert [cfg["objective"]["soft_targets"]["softness"] for cfg in seen] == [{0: 0.1}, {0: 0.1}]


def test_what_needs_a_swept_option_is_swept_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["-m", "objective=[soft_targets],[soft_targets,itm]", "objective.soft_targets.weight=2", "logger=csv"]
    monkeypatch.setattr(sys, "argv", ["m2-train", *lines, f"run.folder={tmp_path}"])
    assert train_command.main() == 2
    text = capsys.readouterr().err
    assert text.startswith("m2-train: objective.soft_targets.weight=2: the chosen objective has no soft_targets")
    assert text.endswith("it needs what is swept; sweep it, too, as in KEY=choice(VALUE)\n")
