"""Every kind of source, cut into slices: what its records are, and where each fault ends up."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from m2_encoder.data.packing.records import Columns, Failure, Record
from m2_encoder.data.packing.sources import Source, find_source
from m2_encoder.errors import UserError
from tests.support.shards import make_image


def _read(source: Source, size: int = 3) -> list[Record | Failure]:
    return [record for part in source.slices(size) for record in part.read()]


def _captions(record: Record | Failure) -> list[tuple[str, str]]:
    assert isinstance(record, Record), record
    return [caption[:2] for caption in record.captions]


def _failures(records: list[Record | Failure]) -> list[tuple[str, str]]:
    return [(record.name, record.reason) for record in records if isinstance(record, Failure)]


def _find(path: Path | str, **values: Any) -> Source:
    return find_source(str(path), columns=values.pop("columns", Columns()), **values)


def test_folder(tmp_path: Path) -> None:
    for name, content in {
        "b/2.png": b"i", "b/2.txt": "猫\n".encode(), "a.jpg": b"i", "a.json": b'{"caption": "cat", "key": "k", "w": 3}',
        "c.webp": b"i", "c.WEBP": b"i", "c.txt": b"c", "d.jpg": b"i", "e.txt": b"e", ".hidden.jpg": b"i",
        "f.jpg": b"i", "f.txt": b"\xff", "g.md": b"", ".git/x.jpg": b"i",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    records = _read(_find(tmp_path, columns=Columns(extra=("w",))))
    assert [record.name for record in records] == ["a.jpg", "b/2.png", "c.WEBP", "c.webp", "d.jpg", "e", "f.jpg"]
    assert _failures(records) == [
        ("c.webp", "duplicate_key"), ("d.jpg", "missing_caption"), ("e", "missing_image"), ("f.jpg", "not_utf8"),
    ]  # fmt: skip
    assert [_captions(record) for record in records[:2]] == [[("cat", "en")], [("猫", "zh")]]
    first, second = records[:2]
    assert isinstance(first, Record)
    assert isinstance(second, Record)
    assert (first.key, second.key, first.extra) == ("k", "b/2", {"w": 3})
    assert first.image == str(tmp_path / "a.jpg")


def test_json_lines(tmp_path: Path) -> None:
    rows = [{"image": f"{i}.jpg", "caption": f"number {i}"} for i in range(4)]
    lines = [json.dumps(row).encode() for row in rows]
    lines[2:2] = [b"{broken", b"", b'{"image": "x", "caption": "\xff"}', b'["list"]']
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(lines))
    records = _read(_find(tmp_path / "t.jsonl"))
    assert _failures(records) == [
        ("t.jsonl: line 3", "bad_json"), ("t.jsonl: line 5", "not_utf8"), ("t.jsonl: line 6", "bad_json"),
    ]  # fmt: skip
    sound = [record for record in records if isinstance(record, Record)]
    assert [record.image for record in sound] == [str(tmp_path / f"{i}.jpg") for i in range(4)]
    assert [record.key for record in sound] == [f"{i}.jpg" for i in range(4)]


def test_a_bad_first_line_is_a_failure_like_others(tmp_path: Path) -> None:
    lines = ["", "{broken", '{"image": "a.jpg"}', '{"image": "b.jpg", "caption": "cat"}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    records = _read(_find(tmp_path / "t.jsonl"))
    assert _failures(records) == [("t.jsonl: line 2", "bad_json"), ("t.jsonl: line 3", "missing_caption")]
    assert _captions(records[-1]) == [("cat", "en")]


def test_csv(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(
        '\ufeffurl,caption,id\nhttp://x/1,"a ""cat"",\nthere",1\nhttp://x/2\n\n'.encode()
        + "http://x/3,猫,3\n".encode()
        + b"http://x/4,\xff\xfe,4\n,nothing,5\n"
    )
    records = _read(_find(tmp_path / "t.csv", image_root="elsewhere"))
    assert _captions(records[0]) == [('a "cat",\nthere', "en")]
    assert _captions(records[2]) == [("猫", "zh")]
    assert _failures(records) == [
        ("t.csv: row 2", "wrong_type"), ("t.csv: row 4", "not_utf8"), ("t.csv: row 5", "missing_image"),
    ]  # fmt: skip


def test_missing_quotation_mark_costs_no_row(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text('image\tcaption\na\tcat\nb\t"Big\nc\tdog\n', encoding="utf-8")
    records = _read(_find(tmp_path / "t.tsv"))
    assert [_captions(record) for record in records] == [[("cat", "en")], [('"Big', "en")], [("dog", "en")]]


def test_folder_in_the_format_of_chinese_clip(tmp_path: Path) -> None:
    (tmp_path / "valid_imgs.tsv").write_bytes(b"7\t" + base64.b64encode(make_image(7)) + b"\n")
    (tmp_path / "valid_texts.jsonl").write_text('{"text": "猫", "image_ids": [7]}', encoding="utf-8")
    (record,) = _read(_find(tmp_path))
    assert _captions(record) == [("猫", "zh")]


def test_chinese_clip(tmp_path: Path) -> None:
    images = {"7": make_image(7), "8": make_image(8), "9": make_image(9)}
    lines = [f"{key}\t".encode() + base64.b64encode(image) for key, image in images.items()]
    lines[1] = b"8\t" + base64.urlsafe_b64encode(images["8"])
    lines += [lines[0], b"10\tnot!base64", b"no tab"]
    (tmp_path / "train_imgs.tsv").write_bytes(b"\n".join(lines) + b"\n")
    texts = [
        {"text_id": 1, "text": "猫", "image_ids": [7, 8]},
        {"text_id": 2, "text": "cat", "image_ids": [7, 10, 99]},
    ]
    (tmp_path / "train_texts.jsonl").write_text("\n".join(json.dumps(text) for text in texts), encoding="utf-8")
    source = _find(tmp_path / "train_imgs.tsv")
    assert source.format == "chinese_clip"
    records = _read(source, 2)
    assert [_captions(record) for record in records[:2]] == [[("cat", "en"), ("猫", "zh")], [("猫", "zh")]]
    assert [record.image for record in records[:2] if isinstance(record, Record)] == [images["7"], images["8"]]
    assert [record.key for record in records[:2] if isinstance(record, Record)] == ["7", "8"]
    assert _failures(records) == [
        ("train_imgs.tsv: line 3", "missing_caption"), ("train_imgs.tsv: line 4", "duplicate_key"),
        ("train_imgs.tsv: line 5", "undecodable_image"), ("train_imgs.tsv: line 6", "wrong_type"),
        ("image 99", "missing_image"),
    ]  # fmt: skip


def test_parquet_rows_across_row_groups(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": make_image(i), "path": None}, "caption": f"number {i}", "w": i} for i in range(11)]
    rows[4]["caption"] = None
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=4)
    records = _read(_find(tmp_path, columns=Columns(extra=("w",))))
    assert _failures(records) == [("t.parquet: row 4", "missing_caption")]
    sound = [record for record in records if isinstance(record, Record)]
    assert [record.extra["w"] for record in sound] == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert all(record.image == make_image(record.extra["w"]) for record in sound)


def test_slices_are_equal_wherever_the_source_lies(tmp_path: Path) -> None:
    prints = []
    for folder in ("one", "two"):
        root = tmp_path / folder
        root.mkdir()
        (root / "t.jsonl").write_text('{"image": "a", "caption": "b"}\n', encoding="utf-8")
        (root / "a.jpg").write_bytes(b"i")
        prints.append(
            [part.fingerprint() for kind in ("jsonl", "folder") for part in _find(
                root / "t.jsonl" if kind == "jsonl" else root, format=kind).slices(5)]
        )  # fmt: skip
    assert prints[0] == prints[1]
    (tmp_path / "two" / "t.jsonl").write_text('{"image": "a", "caption": "c"}\n', encoding="utf-8")
    assert next(_find(tmp_path / "two" / "t.jsonl").slices(5)).fingerprint() != prints[0][0]


@pytest.mark.parametrize(
    ("files", "source", "values", "message"),
    [
        ({}, "gone", {}, "no such file or folder"),
        ({"a.txt": ""}, "", {}, "no image in it"),
        ({"a.jpg": ""}, "gone", {"format": "folder"}, "no such folder"),
        ({"a.xyz": ""}, "a.xyz", {}, "tables of one kind"),
        ({"a.csv": "", "b.jsonl": ""}, "", {}, "tables of one kind"),
        ({"a.csv": ""}, "a.csv", {}, "is empty"),
        ({"a.csv": "x,y\n"}, "a.csv", {}, "no column with the image"),
        ({"a.jsonl": "nonsense"}, "a.jsonl", {}, "line 1: bad_json"),
        ({"a.jsonl": '{"url": 1}'}, "a.jsonl", {}, "no column with the caption"),
        ({"a.jsonl": "\n\n"}, "a.jsonl", {}, "no line in it"),
        ({"a.tsv": f"1\t{'x' * 999}"}, "a.tsv", {}, f"it has '1', '{'x' * 40}…', wanted"),
        ({"a_imgs.tsv": "1\tx"}, "a_imgs.tsv", {}, "a_texts.jsonl is not beside it; name the file"),
        (
            {"a_imgs.tsv": "1\tx", "a_texts.jsonl": "", "b_imgs.tsv": "", "b_texts.jsonl": ""},
            "",
            {},
            r"holds several sets .* \(a_imgs.tsv, b_imgs.tsv\)",
        ),
        ({"a.parquet": "x"}, "a.parquet", {}, "not a Parquet file"),
        ({"a_imgs.tsv": "1\tx"}, "a_imgs.tsv", {"format": "chinese_clip"}, "texts=…_texts.jsonl"),
        ({"a_imgs.tsv": "1\tx", "a_texts.jsonl": "{}"}, "a_imgs.tsv", {}, "line 1: has {}"),
        ({"a_imgs.tsv": "1\tx", "a_texts.jsonl": "[]"}, "a_imgs.tsv", {}, "line 1: bad_json"),
        ({"a.jsonl": "", "t.jsonl": ""}, "a.jsonl", {"texts": "t.jsonl"}, "goes with one .tsv"),
    ],
)
def test_unusable_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], source: str, values: Any, message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        _read(_find(tmp_path / source, **values))
