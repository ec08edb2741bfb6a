from __future__ import annotations

from pathlib import Path

import pytest

from m2_encoder.data.shards.index import build_index
from tests.support.data_commands import Start
from tests.support.shards import make_sample, write_numbers, write_tar


def test_a_split_says_what_is_where(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_numbers(tmp_path / "tars", [10, 10])
    assert start("split", "tars", f"output={tmp_path / 'sides'}", "val=0.2", "workers=0", "names.val=heldout") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  train: 16 samples (0.8000) in 2 tars" in lines
    assert "    captions: 4 en on 4 samples, 4 zh on 4 samples" in lines
    assert "  on both sides: 0 pictures, 0 captions, 0 identities" in lines
    assert sum(len(build_index(path)) for path in (tmp_path / "sides" / "heldout").glob("*.tar")) == 4
    assert start("split", "tars", f"output={tmp_path / 'sides'}", "val=0.2", "workers=0", "names.val=heldout") == 0
    assert "was finished already" in capsys.readouterr().out


def test_a_giant_group_is_named(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = {"captions": {"en": ["photo"]}}
    members = [m for n in range(20) for m in make_sample(f"{n}", n, metadata=one if n < 10 else None)]
    write_tar(tmp_path / "tars" / "0.tar", members)
    assert start("split", "tars", f"output={tmp_path / 'sides'}", "val=0.2", "workers=0") == 0
    captured = capsys.readouterr()
    assert (
        "warning: the largest group holds 10 of 20 samples; 10 of them share the caption 'photo'; with max_"
        in captured.err
    )
    assert start("split", "tars", f"output={tmp_path / 'free'}", "val=0.5", "workers=0", "max_repeats=3") == 0
    assert "1 captions, 0 identities (those of more than 3 samples)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["val=1"], "val=1: must be a number, above 0 and below 1"),
        (["val=0"], "val=0: must be a number, above 0"),
        (["by=person"], "by=person"),
        (["names.val=a/b"], "names.val=a/b: must be a folder's name"),
        (["names.val=train"], "both sides have this name"),
        (["source=nowhere"], "source=nowhere"),
    ],
)
def test_mistakes(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], named: str
) -> None:
    write_numbers(tmp_path / "tars", [2])
    source = [] if argv[0].startswith("source=") else ["source=tars"]
    assert start("split", *source, f"output={tmp_path / 'sides'}", *argv) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "sides").exists()
