"""Every fault of runs, files and processes, injected for real: what is said, and what is kept."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.fault_table import COMMAND, Row, read_rows
from tests.support.once import build_once
from tests.support.run_faults.case import RunFault, write_base
from tests.support.run_faults.table import DOCUMENT, inject, rooms
from tests.support.training import LIGHTNING_WARNINGS

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]
FAULTS = [fault for faults in rooms().values() for fault in faults]


@pytest.fixture(scope="module")
def documented(repo_root: Path) -> dict[str, Row]:
    return read_rows((repo_root / DOCUMENT.path).read_text(encoding="utf-8"))


QUICK = [fault for fault in FAULTS if not fault.is_slow][::2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    """A run that has ended, and the built-in set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(repo_root)
        return build_once(tmp_path_factory, "run_faults", write_base)


def test_the_document_has_every_fault_in_its_order(documented: dict[str, Row]) -> None:
    assert list(documented) == [fault.name for fault in FAULTS]


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, marks=() if fault in QUICK else pytest.mark.slow, id=fault.name) for fault in FAULTS],
)
def test_what_is_said_and_kept(
    tmp_path: Path, base: Path, fault: RunFault, documented: dict[str, Row], repo_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(repo_root)
    told, row, took = inject(fault, tmp_path / "place", base)
    assert told.code == fault.code, told.said
    assert "Traceback" not in told.said
    assert re.fullmatch(fault.kept, told.kept), (told.kept, told.said)
    assert took < fault.within_s
    assert max(map(len, told.said.splitlines())) <= 500
    assert documented[fault.name].rest == row.rest, f"write {DOCUMENT.path} anew: {COMMAND}"
