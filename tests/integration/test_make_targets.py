"""The targets of the Makefile, run by `make` itself on short runs, with the environment that the tests run in."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Make = Callable[..., "subprocess.CompletedProcess[str]"]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def make(repo_root: Path, tmp_path: Path) -> Make:
    """Runs `make` in the checkout; the environment counts as installed, so that nothing is."""
    environment = tmp_path / "environment"
    environment.mkdir()
    (environment / "bin").symlink_to(Path(sys.executable).parent)
    (environment / ".installed").touch()

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "--no-print-directory", *words, f"VENV={environment}"]
        return subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=600)

    return run


def _short(tmp_path: Path, emoji_folder: Path) -> str:
    places = f"run.folder={tmp_path / 'runs'} data.folder={emoji_folder}"
    steps = "trainer.max_steps=2 trainer.val_check_interval=2 scheduler.warmup_steps=1"
    return f"{places} {steps} logger=csv evaluation=[] run.export=false"


def test_train(make: Make, tmp_path: Path, emoji_folder: Path) -> None:
    done = make("train", f"TRAIN=m2-train +experiment=smoke run.name=one {_short(tmp_path, emoji_folder)}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "one" / "summary.json").is_file()


@pytest.mark.slow
def test_a_sweep_with_a_job_that_fails_ends_in_an_error_and_goes_on(
    make: Make, tmp_path: Path, emoji_folder: Path
) -> None:
    swept = "optimizer.lr=1e-3,-1,2e-3 run.name=lrs"
    line = f"SWEEP=m2-train -m +experiment=smoke {swept} {_short(tmp_path, emoji_folder)}"
    done = make("sweep", line)
    assert done.returncode != 0
    assert "optimizer.lr=-1" in done.stderr
    assert len([*(tmp_path / "runs").glob("lrs-*/summary.json")]) == 2
    again = make("sweep", line.replace("1e-3,-1,2e-3", "1e-3,2e-3"))
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("has finished before") == 2
    assert (tmp_path / "runs" / "multirun" / "lrs" / "sweep.csv").is_file()


def test_every_target_is_listed_with_what_it_does(make: Make, repo_root: Path) -> None:
    text = (repo_root / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^\.PHONY: (\S+)$", text, re.MULTILINE)
    listed = make("help").stdout
    assert {"train", "sweep", "notebooks", "serve", "test", "check"} <= {*targets}
    for target in targets:
        assert re.search(rf"^  {target} +\S", listed, re.MULTILINE), target


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("train", "m2-train +experiment=emoji run.resume=auto"),
        ("sweep", "m2-train sweep=emoji"),
        ("serve", "m2-serve index=drawings model=outputs/emoji/export open=true"),
        ("notebooks", "python scripts/run_notebooks.py --small"),
        ("test", "pytest -q --numprocesses=2"),
        ("test-slow", '-m "slow and not gpu'),
    ],
)
def test_what_a_target_runs_unless_told_otherwise(make: Make, target: str, command: str) -> None:
    done = make("--dry-run", target)
    assert done.returncode == 0, done.stderr
    assert command in done.stdout
