"""JSON lines of the official release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from m2_encoder.errors import UserError
from m2_encoder.evaluation.sets.caption_lines import read_caption_lines
from tests.support.shards import make_image

ROWS = [
    {"caption": ["a cat", "one cat"], "image": "val/1.png"},
    {"caption": ["a cat"], "image": "val/2.png"},
    {"caption": "a dog", "image": "val/3.png"},
]


def write(folder: Path, rows: list[Any], *, mark: str = "") -> Path:
    (folder / "val").mkdir(parents=True, exist_ok=True)
    for number in (1, 2, 3):
        (folder / "val" / f"{number}.png").write_bytes(make_image(number))
    file = folder / "coco.jsonl"
    file.write_text(mark + "\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    return file


def test_every_caption_is_a_query_of_its_own_picture(tmp_path: Path) -> None:
    found = read_caption_lines(write(tmp_path, ROWS, mark="\ufeff"))
    assert found.texts["en"].rows == ("a cat", "one cat", "a cat", "a dog")
    assert found.texts["en"].pairs.tolist() == [[0, 0], [1, 0], [2, 1], [3, 2]]
    assert [picture.read() for picture in found.pictures] == [make_image(number) for number in (1, 2, 3)]
    assert found.counts == {"pictures": 3, "texts": {"en": 4}, "equal_texts": {"en": 2}}
    assert found.comparable == "3 pictures, 5,000 published; 4 en texts, 25,010 published"


def test_images_may_lie_elsewhere(tmp_path: Path) -> None:
    file = write(tmp_path / "all", ROWS)
    (tmp_path / "annotations").mkdir()
    moved = file.rename(tmp_path / "annotations" / "set.jsonl")
    found = read_caption_lines(moved, images=str(tmp_path / "all"), name="mine", language="en")
    assert (found.name, found.pictures[0].name) == ("mine", "val/1.png")
    with pytest.raises(UserError, match=r"3 of 3 pictures are not in .*annotations.* say with images=FOLDER"):
        read_caption_lines(moved)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS, ROWS[0]], r"line 4: picture val/1\.png comes twice"),
        ([*ROWS, {"caption": [], "image": "val/4.png"}], "line 4: has caption, image; wanted"),
        ([*ROWS, {"caption": ["x"], "image": "val/4.png"}], r"1 of 4 pictures are not in .*: val/4\.png"),
        ([*ROWS, 5], "line 4: holds 5; wanted a JSON object"),
        (
            [{"caption": ["a cat", "一只猫"], "image": "val/1.png"}],
            "by script, 1 caption in en, 1 in zh; say which it is",
        ),
    ],
)
def test_faults_have_one_line_each(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_caption_lines(write(tmp_path, rows))


def test_half_a_line_is_said(tmp_path: Path) -> None:
    file = write(tmp_path, ROWS)
    file.write_text(file.read_text()[:-20], encoding="utf-8")
    with pytest.raises(UserError, match="line 3: is no JSON"):
        read_caption_lines(file)
