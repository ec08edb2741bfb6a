"""Names, keys and values of any length and form: lines that a command prints are short, and say them as they are."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from m2_encoder.cli.commands import TRAIN
from m2_encoder.config.command import run_command
from m2_encoder.errors import MAX_LINE
from tests.support.data_commands import Start
from tests.support.shards import make_image, make_sample, write_numbers, write_tar

Capture = pytest.CaptureFixture[str]


def printed(capsys: Capture) -> str:
    captured = capsys.readouterr()
    for stream in (captured.out, captured.err):
        assert max(map(len, stream.splitlines()), default=0) <= MAX_LINE
    return captured.out + captured.err


@pytest.mark.parametrize("command", ["check", "stats"])
def test_markup_is_printed_as_it_is(start: Start, tmp_path: Path, capsys: Capture, command: str) -> None:
    def described(number: int) -> dict[str, object]:
        return {"captions": {"en": ["[bold]a [/INST] cat"], "zh": [f"数字 {number}"]}, "[/INST]": 1, ":cat:": 1}

    members = [member for n in range(4) for member in make_sample(f"[/b]{n}", n, metadata=described(n))]
    write_tar(tmp_path / "[red]" / "[b].tar", [*members, ("[/x]bad.png", make_image(9)), ("[/x]bad.[/y]", b"x")])
    assert start(command, "./[red]", "workers=0", "full=true", "batch_size=2") == 0
    text = printed(capsys)
    for said in ("[/INST] 4", ":cat: 4", "[bold]a [/INST] cat", "[/x]bad", "[/y]", "\n./[red]\n"):
        assert said in f"\n{text}"


def test_long_keys_and_many_faults_stay_short(start: Start, tmp_path: Path, capsys: Capture) -> None:
    long = "k" * 100_000
    metadata = {"captions": {"en": ["w" * 100_000]}, long: 1, **{f"key{n}": n for n in range(1000)}}
    members = [member for n in range(3) for member in make_sample(f"{long}{n}", n, metadata=metadata)]
    members += make_sample("plain", 7)
    members += [(f"{long}bad{n}.{long}", b"x") for n in range(30)]
    write_tar(tmp_path / "tars" / "0.tar", members, form=tarfile.GNU_FORMAT)
    assert start("check", "tars", "workers=0", "full=true", "batch_size=2", "max_bad_share=1") == 0
    text = printed(capsys)
    assert "missing_image" in text
    assert len(text.splitlines()) < 80
    write_tar(tmp_path / "none" / "0.tar", members[8:], form=tarfile.GNU_FORMAT)
    assert start("check", "none", "workers=0", "full=true") == 2
    assert "no usable sample" in printed(capsys)


def test_many_problems_and_huge_values(start: Start, tmp_path: Path, capsys: Capture) -> None:
    write_numbers(tmp_path / "tars", [2])
    assert start("check", f"source={'x' * 100_000}") == 2
    assert "no such file" in printed(capsys)
    assert start("check", "tars", f"batch_size={'9' * 100_000}x") == 2
    assert "batch_size=" in printed(capsys)
    assert start("check", "tars", *(f"+{'u' * 1000}{n}=1" for n in range(100))) == 2
    text = printed(capsys)
    assert "100 problems" in text
    assert "… and 81 more" in text
    assert start("y" * 100_000) == 2
    assert "no such sub-command" in printed(capsys)
    assert run_command(TRAIN, [f"{'z' * 100_000}=[1"]) == 2
    printed(capsys)


def test_failures_of_packing_are_counted_not_listed(start: Start, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(2000):
        (tmp_path / "photos" / f"{number:04d}.jpg").write_bytes(b"")
    (tmp_path / "photos" / "good.png").write_bytes(make_image(1))
    (tmp_path / "photos" / "good.json").write_text(json.dumps({"caption": "a cat"}))
    assert start("pack", "photos", f"output={tmp_path / 'tars'}", "workers=0") == 1
    text = printed(capsys)
    assert "2,000 missing_caption" in text
    assert len(text.splitlines()) < 10
