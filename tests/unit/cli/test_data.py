from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from m2_encoder.cli import data

Start = Callable[..., int]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, repo_root: Path) -> Start:
    monkeypatch.chdir(repo_root)

    def run(*argv: str) -> int:
        monkeypatch.setattr(sys, "argv", ["m2-data", *argv])
        return data.main()

    return run


def test_tars_are_unpacked(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start("emoji", f"folder={tmp_path / 'emoji'}", "heldout_style=noto") == 0
    assert list((tmp_path / "emoji" / "train").glob("*.tar"))
    assert json.loads((tmp_path / "emoji" / "emoji.json").read_text())["heldout_style"] == "noto"
    assert "heldout_families" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["emoji"], "Hydra left records behind"


def test_without_a_folder_every_setting_has_its_own(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # outside of a checkout, where outputs/ counts from
    assert start("emoji", "samples_per_shard=5000") == 0
    (folder,) = (tmp_path / "outputs" / "data").iterdir()
    assert re.fullmatch("emoji-twemoji-[0-9a-f]{8}", folder.name)
    assert str(folder) in capsys.readouterr().out
    assert start("emoji", f"folder={folder}") == 2
    assert capsys.readouterr().err == (
        f"m2-data emoji: folder={folder}: holds the built-in set with samples_per_shard=5000, and "
        "samples_per_shard=500 is asked for; give another folder, or null: a folder for each setting\n"
    )


@pytest.mark.parametrize("argv", [["--help"], ["emoji", "--help"]])
def test_help(start: Start, capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert start(*argv) == 0
    assert "m2-data emoji" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["emojii"], "choose from emoji"),
        (["emoji", "heldout_style=openmoij"], "did you mean openmoji"),
        (["emoji", "samples_per_shard=0"], "1 or more"),
        (["emoji", "foldr=x"], "did you mean folder"),
        (["emoji", "+styles=[noto]"], "unknown"),
    ],
)
def test_mistakes(start: Start, capsys: pytest.CaptureFixture[str], argv: list[str], named: str) -> None:
    assert start(*argv) == 2
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.out == ""


def test_odd_names_of_a_source(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path that exists is one path; a value that is refused is not missing, too."""
    monkeypatch.chdir(tmp_path)
    for name in ("a,b", "a=b [c]"):
        Path(name).mkdir()
        Image.new("RGB", (9, 9)).save(Path(name) / "0.png")
        (Path(name) / "0.txt").write_text("a cat")
    assert start("pack", "a=b [c]", f"output={tmp_path}/tars", "workers=0") == 0
    assert start("pack", "source=a,b", f"output={tmp_path}/others", "workers=0") == 0
    capsys.readouterr()
    assert start("check", "source=x,y") == 2
    error = capsys.readouterr().err
    assert "holds several values" in error
    assert "must be given" not in error


def test_without_a_task(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    assert start() == 2
    assert "Sub-commands" in capsys.readouterr().out


def test_foreign_folder_is_left_alone(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert start("emoji", f"folder={tmp_path}") == 2
    assert "thesis.txt" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "years of work"
