"""Folders and tables as cameras, Windows, macOS, pandas and img2dataset leave them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.cli import data
from m2_encoder.data.packing.encodings import find_encoding
from m2_encoder.data.packing.records import Columns, Failure, Record
from m2_encoder.data.packing.sources import find_source
from m2_encoder.errors import UserError
from m2_encoder.files import file_sha256
from tests.support.shards import make_image


def read(source: str | Path, **options: Any) -> list[Record | Failure]:
    found = find_source(str(source), columns=Columns(), **options)
    return [record for part in found.slices(3) for record in part.read()]


def said(records: list[Record | Failure]) -> list[tuple[str, str]]:
    """Key and caption of records, name and reason of failures."""
    return [
        (str(each.key), each.captions[0].text) if isinstance(each, Record) else (each.name, each.reason)
        for each in records
    ]


def fill(folder: Path, *names: str) -> Path:
    """Pictures, and texts that say their own name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_image(len(name)) if path.suffix.lower() in (".jpg", ".png") else f"text {name}".encode())
    return folder


def test_suffixes_of_any_case(tmp_path: Path) -> None:
    folder = fill(tmp_path, "A.JPG", "A.TXT", "b.jpg", "b.Txt", "C.Png", "c.txt", "d.JPG", "e.txt", "E.TXT", "E.jpg")
    (folder / "f.PNG").write_bytes(make_image(1))
    (folder / "f.JSON").write_text('{"caption": "json"}')
    assert said(read(folder)) == [
        ("A", "text A.TXT"), ("C", "text c.txt"), ("E", "text E.TXT"), ("b", "text b.Txt"),
        ("d.JPG", "missing_caption"), ("e", "missing_image"), ("f", "json"),
    ]  # fmt: skip


def test_second_texts_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = fill(
        tmp_path, "a.jpg", "a.txt", "a.TXT", "b.jpg", "b.Txt", "b.TXT", "c.jpg", "c.txt", "c.caption", "d.tags"
    )
    fill(tmp_path, "e.jpg", "e.txt")
    (folder / "e.json").write_text('{"caption": "json"}')
    assert said(read(folder)) == [
        ("a", "text a.txt"), ("b", "text b.TXT"), ("c", "text c.txt"), ("e", "json"),
    ]  # fmt: skip
    unread, both = caplog.messages
    assert unread.startswith("3 texts beside pictures are not read")
    assert unread.endswith(": a.TXT, b.Txt, c.caption")
    assert (both[:22], both[-6:]) == ("1 texts beside picture", " e.txt")
    caplog.clear()
    fill(tmp_path, *(f"{'x' * 200}{n}{suffix}" for n in range(50) for suffix in (".jpg", ".txt", ".TXT")))
    read(folder)
    assert all(len(line) < 400 for line in caplog.messages)
    assert "and 50 more" in caplog.messages[0]


def test_a_caption_that_is_written_again_changes_the_stamp(tmp_path: Path) -> None:
    folder = fill(tmp_path, "A.JPG", "A.TXT")
    part = next(find_source(str(folder), columns=Columns()).slices(9))
    before = part.stamp()
    os.utime(folder / "A.TXT", ns=(1, 1))
    assert part.stamp() != before


def test_names_in_gbk_stay_distinct(tmp_path: Path) -> None:
    for animal in "狗鸟猫鱼":
        for suffix, content in ((".png", make_image(ord(animal))), (".txt", animal.encode())):
            with open(os.path.join(os.fsencode(tmp_path), f"{animal}{suffix}".encode("gbk")), "wb") as file:
                file.write(content)
    assert sorted(said(read(tmp_path))) == [(animal, animal) for animal in sorted("狗鸟猫鱼")]


def test_what_systems_leave_behind_is_left_out(tmp_path: Path) -> None:
    folder = fill(tmp_path, "a.jpg", "a.txt", "._a.jpg", "._a.txt", "__MACOSX/a.jpg", "__MACOSX/a.txt", "b/.DS_Store")
    fill(tmp_path, "Thumbs.db", "desktop.ini", "b/.hidden/c.jpg")
    assert said(read(folder)) == [("a", "text a.txt")]


def test_pictures_win_over_the_table_of_img2dataset(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = fill(tmp_path, *(f"00000/{n:09d}.{kind}" for n in range(3) for kind in ("jpg", "txt")))
    rows = [{"url": f"http://127.0.0.1:9/{n}.jpg", "caption": "x", "status": "success"} for n in range(5)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text("{}")
    found = find_source(str(folder), columns=Columns())
    assert (found.format, [path.name for path in found.left_out]) == ("folder", ["00000.parquet"])
    assert said(read(folder)) == [(f"00000/{n:09d}", f"text 00000/{n:09d}.txt") for n in range(3)]
    assert find_source(str(folder), columns=Columns(), format="parquet").format == "parquet"


def test_a_table_beside_bare_pictures_is_packed(tmp_path: Path) -> None:
    folder = fill(tmp_path, "images/1.jpg", "images/2.jpg")
    (folder / "t.csv").write_text("image,caption\nimages/1.jpg,one\n")
    assert said(read(folder)) == [("images/1.jpg", "one")]


TABLE = 'image,caption\r\na.jpg,"一只猫\r\n坐着"\r\nb.jpg,两只狗\r\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gbk", "gb18030"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_tables_of_windows(tmp_path: Path, encoding: str, separator: str) -> None:
    (tmp_path / "t.csv").write_bytes(TABLE.replace(",", separator).encode(encoding))
    assert said(read(tmp_path / "t.csv")) == [("a.jpg", "一只猫\r\n坐着"), ("b.jpg", "两只狗")]
    (tmp_path / "t.tsv").write_bytes(TABLE.replace(",", separator).encode(encoding))
    assert said(read(tmp_path / "t.tsv"))[1] == ("b.jpg", "两只狗")


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        ("image,caption\na,it\u2019s \u201cbig\u201d\n".encode("cp1252"), "utf-8-sig"),
        ("image,caption\na,café, été, naïve\n".encode("latin-1"), "utf-8-sig"),
        ("image,caption\na,猫\n".encode() + b"b,\xff\n", "utf-8-sig"),
        ("image,caption\na,朱镕基和一只白色的小狗在草地上\n".encode("gbk"), "gb18030"),
    ],
)
def test_encodings_are_told_apart(tmp_path: Path, content: bytes, encoding: str) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    assert find_encoding(tmp_path / "t.csv") == encoding


def test_an_encoding_is_named(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes("image,caption\na.jpg,caf\u00e9 \u2019\n".encode("cp1252"))
    (failure,) = read(table)
    assert isinstance(failure, Failure)
    assert (failure.reason, "encoding=" in failure.detail) == ("not_utf8", True)
    assert said(read(table, encoding="cp1252")) == [("a.jpg", "caf\u00e9 \u2019")]
    with pytest.raises(UserError, match=r"encoding=utf-8: .*not in this encoding"):
        read(table, encoding="utf-8")
    table.write_bytes(TABLE.encode("utf-16-le"))
    with pytest.raises(UserError, match="encoding=utf-16-le"):
        read(table)


def test_json_lines_with_marks_and_of_windows(tmp_path: Path) -> None:
    lines = '{"image": "a.jpg", "caption": "照片"}\r\n'
    (tmp_path / "t.jsonl").write_bytes(lines.encode("utf-8-sig"))
    assert said(read(tmp_path / "t.jsonl")) == [("a.jpg", "照片")]
    for encoding, fix in (("utf-16", "iconv -f utf-16"), ("gbk", "iconv -f gb18030")):
        (tmp_path / "t.jsonl").write_bytes(lines.encode(encoding))
        with pytest.raises(UserError, match=fix):
            read(tmp_path / "t.jsonl")
    with pytest.raises(UserError, match=r"goes with \.csv and \.tsv"):
        read(tmp_path / "t.jsonl", encoding="gbk")


def test_numbers_of_pandas(tmp_path: Path) -> None:
    fill(tmp_path, "12345.jpg", "7.png")
    (tmp_path / "t.csv").write_text("image,caption,id\n12345.0,one,1.0\n7,two,1\n8.0,three,\n7,nan,nan\n7,four,nan\n")
    records = read(tmp_path / "t.csv")
    assert [(Path(str(each.image)).name, each.key) for each in records if isinstance(each, Record)] == [
        ("12345.jpg", "1"), ("7.png", "1"), ("8", "8"), ("7.png", "7.png")
    ]  # fmt: skip
    assert said(records)[3] == ("t.csv: row 4", "missing_caption")
    rows = [{"image": 12345.0, "caption": "one", "id": 3.0}, {"image": 7, "caption": float("nan"), "id": float("nan")}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert said(read(tmp_path / "t.jsonl")) == [("3", "one"), ("t.jsonl: line 2", "missing_caption")]


def test_the_command_says_which_table_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fill(tmp_path / "in", "00000/1.jpg", "00000/1.txt")
    (folder / "00000.csv").write_text("url,caption\nhttp://127.0.0.1:9/a.jpg,x\n")
    argv = ["m2-data", "pack", str(folder), f"output={tmp_path / 'out'}", "workers=0"]
    monkeypatch.setattr("sys.argv", argv)
    assert data.main() == 0
    captured = capsys.readouterr()
    assert "not the rows of 00000.csv" in captured.err
    assert "1 samples" in captured.out
    monkeypatch.setattr("sys.argv", [*argv, "encoding=gbkk", "format=csv"])
    assert data.main() == 2
    assert "encoding=gbkk: is no encoding that Python knows" in capsys.readouterr().err
    assert file_sha256(tmp_path / "out" / "000000.tar")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_captions_of_notepad(tmp_path: Path, encoding: str) -> None:
    folder = fill(tmp_path, "a.jpg", "b.jpg")
    (folder / "a.txt").write_bytes("一只猫\r\n".encode(encoding))
    (folder / "b.json").write_bytes('{"caption": "一只狗"}'.encode(encoding))
    assert said(read(folder)) == [("a", "一只猫"), ("b", "一只狗")]
