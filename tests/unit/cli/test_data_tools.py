"""m2-data pack, check and stats from the command line: what they print, write and refuse, and their exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.support.data_commands import Start
from tests.support.shards import make_image, make_sample, write_numbers, write_tar


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "图片=photos"  # neither is in the grammar of overrides
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.png").write_bytes(make_image(number))
        (folder / f"{number}.txt").write_text(f"图片 {number}", encoding="utf-8")
    return folder


def test_pack_then_check(start: Start, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        start("pack", f"source={photos.name}", f"output={tmp_path / 'tars'}", "samples_per_shard=4", "workers=0") == 0
    )
    assert "6 samples in 2 tars" in capsys.readouterr().out
    assert start("check", f"source={tmp_path}/tars/{{000000..000001}}.tar", "batch_size=4", "workers=0") == 0
    printed = capsys.readouterr().out
    assert "usable samples  6 (100.00% of those there)" in printed
    assert "warning: all captions are in zh" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([photos.name, "tars"]), (
        "Hydra left records behind"
    )


def test_a_source_needs_no_key(start: Start, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = photos.rename(tmp_path / "图片 photos")
    assert start("pack", photos.name, f"output={tmp_path / 'a'}", "workers=0") == 0
    assert start("pack", "workers=0", "output=b", photos.name) == 0
    capsys.readouterr()
    assert start("check", "a", "b", "batch_size=4", "workers=0", "json=true") == 0
    assert json.loads(capsys.readouterr().out)["usable"] == 12
    assert start("check", "a", "source=b") == 2
    assert "a and source=b both name what to read" in capsys.readouterr().err
    assert start("check", "--cfg", "job", "a") == 0
    assert start("check", "nowhere") == 2
    assert "nowhere" in capsys.readouterr().err


def test_failures_are_counted_and_named(start: Start, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "5.png").write_bytes(make_image(5)[:-80])
    values = (f"source={photos}", f"output={photos.parent / 'tars'}", "workers=0")
    assert start("pack", *values) == 1
    printed = capsys.readouterr().out
    assert "1 failed, listed in" in printed
    assert "1 undecodable_image" in printed
    assert start("pack", *values, "max_failed_share=0.2") == 0
    assert "1 of them from an earlier run" in capsys.readouterr().out
    assert start("pack", *values, "verify=false") == 2
    assert "packed with other options (images)" in capsys.readouterr().err


def test_pack_tables_by_named_columns(start: Start, photos: Path, tmp_path: Path) -> None:
    rows = [{"file": f"{i}.png", "title": f"number {i}", "license": "CC0"} for i in range(6)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    arguments = (
        f"source={tmp_path / 't.jsonl'}", f"output={tmp_path / 'tars'}", f"image_root={photos}", "columns.image=file",
        "columns.caption=title", "columns.extra=[license]", "pattern=n-%05d.tar", "workers=0", "max_side=8",
    )  # fmt: skip
    assert start("pack", *arguments) == 0
    assert json.loads((tmp_path / "tars" / "pack.json").read_text())["changed_images"] == 6
    assert [path.name for path in (tmp_path / "tars").glob("*.tar")] == ["n-00000.tar"]


FILES = {
    "t.txt": "x", "void.csv": "", "void.jsonl": "", "head.csv": "image,caption\n", "bad.parquet": "abc",
    "good.csv": "image,caption\n1.png,a\n",
}  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["pack"], "source=???"),
        (["pack", "source=gone", "output=tars"], "gone: no such file or folder"),
        (["pack", "source=[]", "output=tars"], "source=[]: must be"),
        (["pack", "source=图片=photos", "output=tars", "format=jsonlines"], "did you mean jsonl"),
        (["pack", "source=图片=photos", "output=tars", "pattern=x.tar"], "wukong-%06d.tar"),
        (["pack", "source=图片=photos", "output=tars", "quality=0"], "1..95"),
        (["pack", "source=图片=photos", "output=tars", "columns=x"], "columns"),
        (["pack", "source=图片=photos", "output=tars", "columns.extra=x"], "a list of texts"),
        (["pack", "source=图片=photos", "output=tars", "language=fr"], "zh or en, or a tag"),
        (["pack", "source=gone", "output=tars"], "source=gone: "),
        (["pack", "source=图片=photos", "output=图片=photos/tars"], "lies inside of source"),
        (["pack", "source=图片=photos", "output=图片=photos"], "lies inside of source"),
        (["pack", "source=图片=photos", "output=t.txt"], "cannot be written: Not a directory"),
        (["pack", "source=图片=photos", "output=tars"], "output=TMP/tars: holds other files (000000.tar)"),
        (["pack", "source=tars", "output=more"], "source=tars: holds tars already; m2-data check"),
        (["pack", "source=empty", "output=more"], "source=empty: "),
        (["pack", "source=图片=photos/0.png", "output=more"], "give a folder with images"),
        (["pack", "source=head.csv", "output=more"], "source=head.csv: nothing could be packed: there are no records"),
        (["pack", "source=void.csv", "output=more"], "void.csv: is empty"),
        (
            ["pack", "source=good.csv", "output=more", "columns.caption=title"],
            "it has 'image', 'caption', wanted title",
        ),
        (["pack", "source=good.csv", "output=more", "columns.imge=x"], "did you mean image"),
        (["pack", "source=good.csv", "output=more", "columns.extra=[license]"], "no column 'license'"),
        (["pack", "source=void.jsonl", "output=more"], "no line in it; each line must be"),
        (["pack", "source=t.txt", "output=more"], "files end in .txt"),
        (["pack", "source=bad.parquet", "output=more"], "not a Parquet file"),
        (["check", "source=gone"], "no such file"),
        (["check", "source=s3://bucket/a.tar"], "cache=FOLDER"),
        (["check", "source=图片=photos"], "no *.tar there"),
        (["check", "source=tars", "max_shards=0"], "1 or more"),
        (["stats", "source=tars", "plot=x.jpg"], "must end in .png, .svg, .pdf"),
        (["stats", "source=tars", "tokenizer=gone.model"], "tokenizer=gone.model: no such file"),
        (["stats", "source=tars", "tokenizer=void.csv"], "tokenizer=void.csv: the tokenizer file is empty"),
        (["stats", "source=tars", "context_length=1"], "2 or more"),
    ],
)
def test_mistakes(
    start: Start, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], named: str
) -> None:
    write_numbers(tmp_path / "tars", [3])
    (tmp_path / "empty").mkdir()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert start(*argv) == 2
    captured = capsys.readouterr()
    assert named.replace("TMP", str(tmp_path)) in captured.err
    assert len(captured.err.strip().splitlines()) == (3 if argv == ["pack"] else 1), captured.err
    assert captured.out == ""


@pytest.mark.parametrize("command", ["pack", "check", "stats"])
def test_help(start: Start, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert start(command, "--help") == 0
    assert f"m2-data {command} source=" in capsys.readouterr().out


def test_check_as_json(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_numbers(tmp_path / "tars", [3])
    assert start("check", f"source={tmp_path / 'tars'}", "json=true", f"output={tmp_path / 'c.json'}") == 0
    printed = capsys.readouterr().out
    assert json.loads(printed) == json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert json.loads(printed)["samples"] == 3
    assert start("check", f"source={tmp_path / 'tars'}", f"output={tmp_path / 'c.json'}") == 2
    assert "overwrite=true" in capsys.readouterr().err


def test_pointless_source_ends_with_2(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "tars" / "0.tar", make_sample("0", 0, metadata={"alt": "x"}))
    assert start("check", f"source={tmp_path / 'tars'}") == 2
    printed = capsys.readouterr().out
    assert "problem: no usable sample (1 missing_caption" in printed
    assert "its JSON has alt" in printed
    assert start("stats", f"source={tmp_path / 'tars'}") == 2


def test_stats_with_numbers_and_picture(start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra `plot`")
    odd = [{"captions": {"zh": ["一只猫$", "龘龘的罕见字"], "en": ["ünïcödé 🐈", "a cat"]}}] * 3
    members = [m for i, text in enumerate(odd) for m in make_sample(f"{i}", i, metadata=text)]
    write_tar(tmp_path / "tars" / "0.tar", members)
    write_numbers(tmp_path / "tars" / "more", [2])
    arguments = [f"source={tmp_path / 'tars'}", f"output={tmp_path / 's.json'}", f"plot={tmp_path / 's.png'}"]
    assert start("stats", *arguments, "context_length=3") == 0
    assert "a context of 3 holds 1, longer captions lose their beginning" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))["statistics"]
    assert numbers["lengths"]["words"]["zh"] == {"lengths": [2, 5], "counts": [3, 3]}
    assert set(numbers["lengths"]) == {"characters", "words", "tokens"}
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50
    assert start("stats", *arguments, "overwrite=true", f"font={tmp_path / 's.json'}") == 2
    assert "not a font that can be read" in capsys.readouterr().err
