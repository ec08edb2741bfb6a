"""Chinese-CLIP's pairs of files."""

from __future__ import annotations

import base64
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.errors import UserError
from m2_encoder.evaluation.sets.chinese_clip import read_chinese_clip
from tests.support.shards import make_image

TEXTS = [
    {"text_id": 10, "text": "红色连衣裙", "image_ids": [7, 5]},
    {"text_id": 11, "text": "红色连衣裙", "image_ids": [5]},
    {"text_id": 12, "text": "蓝色鞋子", "image_ids": ["9"]},
]


def write(folder: Path, texts: list[dict[str, Any]], *, split: str = "valid", ids: tuple[int, ...] = (5, 7, 9)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{number}\t{base64.urlsafe_b64encode(make_image(number)).decode()}\n" for number in ids]
    (folder / f"{split}_imgs.tsv").write_text("".join(lines))
    content = "\n".join(json.dumps(text, ensure_ascii=False) for text in texts)
    (folder / f"{split}_texts.jsonl").write_text(content, encoding="utf-8-sig")
    return folder


def test_texts_with_several_pictures(tmp_path: Path) -> None:
    found = read_chinese_clip(write(tmp_path / "muge", TEXTS, ids=(5, 7, 8, 9)))
    assert found.texts["zh"].rows == ("红色连衣裙", "红色连衣裙", "蓝色鞋子")
    assert found.texts["zh"].pairs.tolist() == [[0, 1], [0, 0], [1, 0], [2, 3]]
    assert [picture.name for picture in found.pictures] == ["5", "7", "8", "9"]
    assert [picture.read() for picture in found.pictures] == [make_image(number) for number in (5, 7, 8, 9)]
    assert found.counts["pictures_without_text"] == 1
    assert found.comparable == "4 pictures, 29,806 published; 3 zh texts, 5,008 published"


def test_one_of_several_splits(tmp_path: Path) -> None:
    write(tmp_path, TEXTS)
    write(tmp_path, TEXTS[:1], split="test")
    assert len(read_chinese_clip(tmp_path, split="test").texts["zh"].rows) == 1
    assert len(read_chinese_clip(tmp_path / "valid_imgs.tsv").texts["zh"].rows) == 3
    with pytest.raises(UserError, match=r"several splits among test_imgs\.tsv, valid_imgs\.tsv; choose one with split"):
        read_chinese_clip(tmp_path)
    with pytest.raises(UserError, match="no split train among"):
        read_chinese_clip(tmp_path, split="train")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([{**text, "image_ids": []} for text in TEXTS], "a test split without answers; evaluate the split valid"),
        ([{"text_id": 1, "text": "鞋"}], "a test split without answers"),
        ([*TEXTS, {"text_id": 13, "text": "鞋", "image_ids": []}], "1 texts have no image_ids: 13"),
        (
            [*TEXTS, {"text_id": 13, "text": "鞋", "image_ids": [6]}],
            "1 image_ids are not in .*: 6 of text 13",
        ),
        ([*TEXTS, TEXTS[0]], "line 4: text 10 comes twice"),
        ([{"text_id": 1, "caption": "鞋"}], "has text_id, caption; wanted text_id, text and a list image_ids"),
    ],
)
def test_faulty_texts(tmp_path: Path, texts: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_chinese_clip(write(tmp_path, texts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-11], r"line 3: its base64 is cut; download the file again"),
        (lambda content: content + content[:40] + b"=\n", "line 4: "),
        (lambda content: content.replace(b"\t", b" "), "line 1: wanted id<TAB>base64"),
        (lambda content: b"", "is empty"),
        (lambda content: content + content, "line 4: picture 5 comes twice"),
    ],
)
def test_faulty_pictures(tmp_path: Path, change: Any, message: str) -> None:
    file = write(tmp_path, TEXTS) / "valid_imgs.tsv"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError, match=message):
        read_chinese_clip(tmp_path)


def test_both_files_belong_together(tmp_path: Path) -> None:
    write(tmp_path, TEXTS)
    (tmp_path / "valid_texts.jsonl").rename(tmp_path / "test_texts.jsonl")
    with pytest.raises(UserError, match=r"valid_texts\.jsonl is not there"):
        read_chinese_clip(tmp_path)


def test_content_is_not_held(tmp_path: Path) -> None:
    write(tmp_path, [{"text_id": 0, "text": "图", "image_ids": [0]}], ids=())
    encoded = base64.b64encode(bytes(300_000)).decode()
    with (tmp_path / "valid_imgs.tsv").open("w") as file:
        for number in range(100):
            file.write(f"{number}\t{encoded}\n")
    tracemalloc.start()
    found = read_chinese_clip(tmp_path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.pictures) == 100
    assert held < 300_000  # of 40 MB
    assert peak < 4_000_000
