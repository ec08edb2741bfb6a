"""A folder of a user's own, outside the package: modules that Python can import, and configurations beside them."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from m2_encoder.cli import train
from tests.support.training import LIGHTNING_WARNINGS

Train = Callable[..., Path]
"""Runs `m2-train` with arguments in the test's folder; gives the folder of the run."""


class Own:
    """The folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, text: str) -> None:
        """Write a file, below the folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Own:
    """An empty folder from which Python imports."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return Own(folder)


@pytest.fixture
def m2_train(own: Own, emoji_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """The smallest run of `m2-train`, with `--config-dir` of the user's own."""

    def run(*arguments: str, code: int = 0) -> Path:
        lines = [
            *("m2-train", "--config-dir", str(own.folder), "+experiment=smoke", f"data.folder={emoji_folder}"),
            *(f"run.folder={tmp_path / 'outputs'}", "run.name=mine", "trainer.max_steps=2", "scheduler.max_steps=4"),
            *("scheduler.warmup_steps=0", "trainer.val_check_interval=2", "trainer.limit_val_batches=0"),
        ]
        monkeypatch.setattr(sys, "argv", [*lines, *arguments])
        assert train.main() == code
        return tmp_path / "outputs" / "mine"

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lightning's own warnings are not ours."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for warning in LIGHTNING_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))
