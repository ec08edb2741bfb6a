"""Output that nobody reads, or that cannot say a character, ends no command."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from m2_encoder.config.output import lasting_output


def stream(descriptor: int, *, encoding: str = "utf-8", write_through: bool = False) -> io.TextIOWrapper:
    """As Python makes one at its start."""
    raw = io.FileIO(descriptor, "w", closefd=True)
    buffer = raw if write_through else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding=encoding, errors="strict", write_through=write_through)


@pytest.mark.parametrize("write_through", [False, True])
def test_a_reader_that_has_gone(monkeypatch: pytest.MonkeyPatch, write_through: bool) -> None:
    read, write = os.pipe()
    out = stream(write, write_through=write_through)
    monkeypatch.setattr(sys, "stdout", out)
    with lasting_output():
        print("first", flush=True)
        assert os.read(read, 100) == b"first\n"
        os.close(read)
        for _ in range(2000):
            print("more than a pipe or a buffer holds")
        assert not sys.stdout.isatty()
        assert sys.stdout.fileno() == write
    assert sys.stdout is out
    out.close()  # nothing is left in it that would raise


def test_a_full_disk_under_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    with stream(os.open("/dev/full", os.O_WRONLY)) as full:
        monkeypatch.setattr(sys, "stderr", full)
        with lasting_output():
            print("x" * 100_000, file=sys.stderr, flush=True)


@pytest.mark.parametrize(
    ("encoding", "said"),
    [("ascii", r"a \u732b \xe9 \udcff"), ("latin-1", "a \\u732b \xe9 \\udcff"), ("utf-8", "a 猫 é \\udcff")],
)
def test_a_character_that_the_encoding_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, said: str
) -> None:
    path = tmp_path / "out"
    with stream(os.open(path, os.O_WRONLY | os.O_CREAT), encoding=encoding) as out:
        monkeypatch.setattr(sys, "stdout", out)
        with lasting_output():
            print("a 猫 é \udcff")
    assert path.read_bytes().decode(encoding) == f"{said}\n"


def test_streams_that_are_no_files_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(sys, "stdout", text)
    with lasting_output():
        assert sys.stdout is text
        print("猫")
    assert text.getvalue() == "猫\n"
