"""One process at a time in a run's folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.config import command as cli
from m2_encoder.config import relations
from m2_encoder.config.paths import default_run_folder
from m2_encoder.config.run_folder import hold_run
from m2_encoder.errors import UserError
from tests.support.locks import held_elsewhere


def settings(folder: Path, *, resume: str = "never") -> dict[str, Any]:
    return {"run": {"name": "x", "folder": str(folder), "resume": resume}}


@pytest.mark.parametrize("resume", ["never", "auto", "must"])
def test_a_second_start_is_refused_while_the_first_lives(tmp_path: Path, resume: str) -> None:
    with (
        held_elsewhere(tmp_path / "x" / ".lock") as pid,
        pytest.raises(UserError, match=rf"^run\.name=x: a run of this name is at work \(pid {pid} on .*another run\.n"),
        hold_run(settings(tmp_path, resume=resume)),
    ):
        pass
    with hold_run(settings(tmp_path, resume=resume)):
        assert json.loads((tmp_path / "x" / ".lock").read_bytes())["pid"] == os.getpid()
    assert list((tmp_path / "x").iterdir()) == []


def test_a_run_that_came_and_went_since_the_check_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.yaml").touch()
    with pytest.raises(UserError, match="holds a run already"), hold_run(settings(tmp_path)):
        pass
    with hold_run(settings(tmp_path, resume="auto")):
        pass


def test_other_ranks_leave_it_to_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with held_elsewhere(tmp_path / "x" / ".lock"), hold_run(settings(tmp_path)):
        pass


def test_another_machine_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / ".lock").write_text('{"host": "node-3", "pid": 17, "since": "2026-01-01 00:00:00"}')
    with hold_run(settings(tmp_path)):
        said = "run x: its last start did not end by itself (pid 17 on node-3, since 2026-01-01 00:00:00); going on, "
        assert capsys.readouterr().err.startswith(said)


def test_the_command_refuses_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from m2_encoder.cli.commands import TRAIN

    arguments = ["+experiment=smoke", "run.name=x", f"run.folder={tmp_path}", "run.resume=auto"]
    for probed in (True, False):  # by the check, or where both came through it at once
        with held_elsewhere(tmp_path / "x" / ".lock"):
            if not probed:
                monkeypatch.setattr(relations, "find_holder", lambda _path: None)
            assert cli.run_command(TRAIN, arguments) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("m2-train: run.name=x: a run of this name is at work (pid ")
        assert captured.err.count("\n") == 1
        assert [path.name for path in (tmp_path / "x").iterdir()] == [".lock"]


def test_each_job_of_a_sweep_holds_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[list[str]] = []

    def run(cfg: dict[str, Any]) -> None:
        held.append(sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "outputs").rglob(".lock")))

    conf = tmp_path / "conf" / "commands"
    conf.mkdir(parents=True)
    (conf / "toy.yaml").write_text("size: 1\nrun:\n  name: x\n  folder: " + str(tmp_path / "outputs") + "\n")
    monkeypatch.setattr(cli, "find_conf", lambda: tmp_path / "conf")
    toy = cli.Command(
        name="toy", config_name="toy", config_folder="commands", summary="", examples=("toy",),
        check=lambda _cfg: [], run=run, run_folder=default_run_folder,
    )  # fmt: skip
    assert cli.run_command(toy, ["-m", "size=1,2", f"hydra.sweep.dir={tmp_path}/sweep"]) == 0
    assert cli.run_command(toy, []) == 0
    assert held == [["outputs/x-size=1/.lock"], ["outputs/x-size=2/.lock"], ["outputs/x/.lock"]]
