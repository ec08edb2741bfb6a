from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.config import command as cli
from m2_encoder.config.paths import default_run_folder
from m2_encoder.config.problems import UNSET
from m2_encoder.errors import Problem, UserError

Run = Callable[[dict[str, Any]], int | None]


def _check(cfg: dict[str, Any]) -> list[Problem]:
    size = cfg["size"]
    return [] if size is UNSET or size > 0 else [Problem("size", size, "must be above 0", "try size=1")]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Starts a command whose work is a function of the test's."""
    conf = tmp_path / "conf"
    (conf / "kind").mkdir(parents=True)
    (conf / "tool.yaml").write_text(
        f"defaults: [_self_, kind: one]\nsize: 1\nrun: {{name: try, folder: '{tmp_path / 'outputs'}'}}\n",
        encoding="utf-8",
    )
    for name in ("one", "two"):
        (conf / "kind" / f"{name}.yaml").write_text(f"label: {name}\n", encoding="utf-8")
    monkeypatch.setattr(cli, "find_conf", lambda: conf)
    monkeypatch.chdir(tmp_path)
    for variable in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(variable, raising=False)

    def run(work: Run, *argv: str, has_folder: bool = False, **more: Any) -> int:
        command = cli.Command(
            name="m2-tool",
            config_name="tool",
            summary="Test things.",
            examples=("m2-tool size=2",),
            check=_check,
            run=work,
            run_folder=default_run_folder if has_folder else None,
            notes=("A note.",),
            **more,
        )
        monkeypatch.setattr(sys, "argv", ["m2-tool", *argv])
        return cli.run_command(command)

    return run


def test_an_open_value_is_shown_and_not_refused(
    start: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "conf" / "tool.yaml").open("a", encoding="utf-8") as file:
        file.write("open: ???\nsame: ${open}\n")
    for lines, shown in (
        (["--cfg", "job"], "open: ???\nsame: ${open}\n"),
        (["--cfg", "all"], "open: ???\nsame: ${open}\n"),
        (["--cfg", "job", "--resolve"], "open: ???\nsame: ???\n"),
        (["--cfg", "job", "--package", "run"], "# @package run\nname: try\n"),
        (["--cfg", "hydra", "-p", "hydra.sweep"], "# @package hydra.sweep\n"),
    ):
        assert start(_never, *lines) == 0
        assert shown in capsys.readouterr().out, lines
    assert start(_never, "--cfg", "job", "--package", "nothing") == 2
    assert "package 'nothing' not found" in capsys.readouterr().err
    assert start(_never, "--package", "run") == 2
    assert capsys.readouterr().err == "m2-tool: --package: only together with --cfg job\n"
    assert start(_never, "--cfg", "job", "sizes=1") == 2
    assert start(_never) == 2
    assert "open=???: must be given" in capsys.readouterr().err


def _never(_cfg: dict[str, Any]) -> int:
    raise AssertionError("ran although it should not")


def test_work_gets_plain_values(start: Callable[..., int]) -> None:
    seen: list[dict[str, Any]] = []
    assert start(seen.append, "size=2", "kind=two", "+more={a: [1, x]}") == 0
    (cfg,) = seen
    assert (type(cfg), type(cfg["more"]), type(cfg["more"]["a"])) == (dict, dict, list)
    assert (cfg["size"], cfg["kind"], cfg["more"]) == (2, {"label": "two"}, {"a": [1, "x"]})


def test_exit_code_of_the_work(start: Callable[..., int]) -> None:
    assert start(lambda _cfg: 1) == 1


def test_command_without_a_folder_writes_nothing(start: Callable[..., int], tmp_path: Path) -> None:
    assert start(lambda _cfg: None) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["conf"]


def test_records_go_to_the_run_folder(start: Callable[..., int], tmp_path: Path) -> None:
    assert start(lambda _cfg: None, "run.name=x", has_folder=True) == 0
    assert {path.name for path in (tmp_path / "outputs" / "x" / ".hydra").iterdir()} >= {
        "config.yaml",
        "overrides.yaml",
    }
    assert [path.name for path in (tmp_path / "outputs" / "x").iterdir()] == [".hydra"], "no log files"


def test_problems_of_overrides_and_values_come_together(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(_never, "size=-1", "sise=2", "kind=three") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "m2-tool: 3 problems:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["sise=2", "kind=three", "size=-1"]


def test_user_error_of_the_work_is_one_line(start: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    def work(_cfg: dict[str, Any]) -> None:
        raise UserError("photos:\n  no such folder")

    assert start(work) == 2
    assert capsys.readouterr().err == "m2-tool: photos: no such folder\n"


def test_user_error_inside_another_exception(start: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    def work(_cfg: dict[str, Any]) -> None:
        try:
            raise UserError("scale=3 must be at most 1")
        except UserError as error:
            raise RuntimeError("Error in call to target") from error

    assert start(work) == 2
    assert capsys.readouterr().err == "m2-tool: scale=3 must be at most 1\n"


def test_a_full_disk_is_one_line_wherever_it_is_met(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    def work(_cfg: dict[str, Any]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "/data/x.json")

    assert start(work) == 2
    said = "No space left on device for /data/x.json: make room there and start again; what is finished is kept"
    assert capsys.readouterr().err == f"m2-tool: {said}\n"


def test_a_full_disk_at_the_start_names_the_run_folder(
    start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def save(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hydra.core.utils._save_config", save)
    assert start(_never, has_folder=True) == 2
    (line,) = capsys.readouterr().err.splitlines()
    place = tmp_path / "outputs" / "try"
    assert line.startswith(f"m2-tool: No space left on device in {place}: make room there and start again")


def test_bug_keeps_its_traceback(start: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    def work(_cfg: dict[str, Any]) -> None:
        raise RuntimeError("a bug")

    assert start(work) == 1
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert "a bug" in text


def test_interruption(start: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    def work(_cfg: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    assert start(work) == 130
    assert capsys.readouterr().err.strip() == "m2-tool: interrupted"


def test_full_error(start: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(UserError, match="must be above 0"):
        start(_never, "size=-1")


def test_only_the_first_rank_speaks(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert start(_never, "size=-1") == 2
    assert capsys.readouterr().err == ""


def test_help(start: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert start(_never, "--help") == 0
    text = capsys.readouterr().out
    for part in ("Test things.", "m2-tool size=2", "one* | two", "--multirun", "A note."):
        assert part in text


def test_composed_configuration_can_be_shown(start: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert start(_never, "size=-1", "--cfg", "job") == 0
    assert "size: -1" in capsys.readouterr().out


def test_sweep_gives_every_job_its_name(start: Callable[..., int], tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    assert start(seen.append, "-m", "size=1,2", "kind=two", has_folder=True) == 0
    assert [(cfg["run"]["name"], cfg["size"]) for cfg in seen] == [("try-size=1", 1), ("try-size=2", 2)]
    assert (tmp_path / "outputs" / "multirun").is_dir()


def test_values_may_refer_to_swept_ones(start: Callable[..., int]) -> None:
    seen: list[dict[str, Any]] = []
    assert start(seen.append, "-m", "size=${more}", "+more=1,2", has_folder=True) == 0
    assert [(cfg["run"]["name"], cfg["size"]) for cfg in seen] == [("try-more=1", 1), ("try-more=2", 2)]


def test_records_of_a_sweep_go_where_they_are_wanted(start: Callable[..., int], tmp_path: Path) -> None:
    folder = tmp_path / "records"
    assert start(lambda _cfg: None, "-m", "size=1,2", f"hydra.sweep.dir={folder}", has_folder=True) == 0
    assert (folder / "multirun.yaml").is_file()
    assert not (tmp_path / "outputs" / "multirun").exists()


def test_a_job_that_fails_does_not_end_the_others(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []

    def work(cfg: dict[str, Any]) -> int | None:
        seen.append(cfg["size"])
        if cfg["size"] == 2:
            raise UserError("the file is gone", key="data", value="x")
        if cfg["size"] == 3:
            raise RuntimeError("no more memory")
        return int(cfg["size"] == 4)

    ended: list[Any] = []
    assert start(work, "-m", "size=1,2,3,4,5", has_folder=True, end_sweep=lambda _, jobs: ended.extend(jobs)) == 1
    assert seen == [1, 2, 3, 4, 5]
    assert [each.state for each in ended] == ["finished", "refused", "failed", "failed", "finished"]
    err = capsys.readouterr().err
    assert "RuntimeError: no more memory" in err
    assert err.splitlines()[-5:] == [
        "m2-tool: 5 jobs: 2 finished, 1 refused, 2 failed",
        "  try-size=2: refused (data=x: the file is gone)",
        "  try-size=3: failed (RuntimeError: no more memory)",
        "  try-size=4: failed (exit code 1)",
        "m2-tool: the same command runs what is left",
    ]


def test_jobs_that_are_done_are_passed_over(start: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[int] = []
    again = {"has_folder": True, "is_done": lambda cfg: cfg["size"] == 2}
    assert start(lambda cfg: seen.append(cfg["size"]), "-m", "size=1,2", **again) == 0
    assert seen == [1]
    assert capsys.readouterr().err.splitlines()[-1] == "m2-tool: 2 jobs: 1 finished, 1 finished before"


def test_an_interrupted_sweep_ends(start: Callable[..., int]) -> None:
    seen: list[int] = []

    def work(cfg: dict[str, Any]) -> None:
        seen.append(cfg["size"])
        raise KeyboardInterrupt

    assert start(work, "-m", "size=1,2", has_folder=True) == cli.EXIT_INTERRUPTED
    assert seen == [1]


def test_a_job_that_is_refused_is_named_first_and_passed_over(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []
    told: list[str] = []

    def work(cfg: dict[str, Any]) -> None:
        seen.append(cfg["size"])
        told.append(capsys.readouterr().err)

    ended: list[Any] = []
    assert start(work, "-m", "size=1,-1,2", has_folder=True, end_sweep=lambda _, jobs: ended.extend(jobs)) == 1
    assert seen == [1, 2]
    assert "1 of 3 jobs are refused; the others run:\n  try-size=-1: size=-1: " in told[0]
    assert [each.state for each in ended] == ["finished", "refused", "finished"]
    assert "  try-size=-1: refused (size=-1: " in capsys.readouterr().err


@pytest.mark.parametrize("words", [["size=-1,-2"], ["size=1,x{"], ["size=1,2", "sise=1"], ["kind=two,three"]])
def test_a_sweep_in_which_no_job_can_run_starts_none(
    start: Callable[..., int], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(_never, "-m", *words, has_folder=True) == 2
    assert words[-1].partition("=")[0] in capsys.readouterr().err


def test_sweep_with_colliding_names_starts_none(start: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert start(_never, "-m", "run.name=a,a", has_folder=True) == 2
    assert "two jobs" in capsys.readouterr().err


def test_argv_is_restored_and_complete_meanwhile(start: Callable[..., int]) -> None:
    seen: list[list[str]] = []
    assert start(lambda _cfg: seen.append(sys.argv), "size=2") == 0
    # Lightning starts other ranks with it.
    assert seen[0][:2] == ["m2-tool", "size=2"]
    assert "hydra.run.dir=." in seen[0]
    assert sys.argv == ["m2-tool", "size=2"]


def test_folder_with_special_characters(start: Callable[..., int], tmp_path: Path) -> None:
    folder = tmp_path / 'a "b", [c]=d'
    quoted = str(folder).replace('"', '\\"')
    assert start(lambda _cfg: None, f'run.folder="{quoted}"', has_folder=True) == 0
    assert (folder / "try" / ".hydra").is_dir()


@pytest.mark.parametrize("argv", [["size=2", "--cfg", "job", "kind=two"], ["--cfg", "job", "size=2", "kind=two"]])
def test_flags_may_stand_anywhere(
    start: Callable[..., int], capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    assert start(_never, *argv) == 0
    assert "label: two" in capsys.readouterr().out
