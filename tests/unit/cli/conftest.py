from __future__ import annotations

import sys
from pathlib import Path

import pytest

from m2_encoder.cli import data
from tests.support.data_commands import Start


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Start:
    """`m2-data` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> int:
        monkeypatch.setattr(sys, "argv", ["m2-data", *argv])
        return data.main()

    return run
