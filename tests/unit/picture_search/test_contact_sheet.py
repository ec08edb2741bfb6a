"""Sheets of pictures of all shapes, with names in Chinese, and of files that are no pictures any more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2_encoder.evaluation.pictures.drawing import drawable
from m2_encoder.picture_search.contact_sheet import Cell, Section, draw_sheet

WIDE = (220, 30, 40)
TALL = (20, 90, 210)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "p"
    folder.mkdir()
    Image.new("RGB", (300, 100), WIDE).save(folder / "宽.png")
    Image.new("RGBA", (1, 400), (*TALL, 255)).save(folder / "tall.png")
    (folder / "broken.jpg").write_bytes(b"none")
    return folder


def count(pixels: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((np.abs(pixels.astype(int) - color).max(axis=2) < 8).sum())


def draw(path: Path, root: Path, names: list[str], *, title: str = "红色的水果", heading: str = "") -> np.ndarray:
    cells = [Cell(name, f"{number} 0.5", number < 2) for number, name in enumerate(names)]
    draw_sheet(path, [Section(heading, cells)], root=root, title=title, subtitle="照片")
    with Image.open(path) as sheet:
        return np.array(sheet.convert("RGB"))


def test_whole_pictures_are_drawn_and_bad_ones_named(root: Path, tmp_path: Path) -> None:
    names = ["宽.png", "tall.png", "broken.jpg", "gone.png", "很长的文件夹/" * 12 + "x.png", "a\n\u202eb.png", "宽.png"]
    pixels = draw(tmp_path / "new" / "sheet.png", root, names)
    wide, tall = count(pixels, WIDE), count(pixels, TALL)
    assert wide == pytest.approx(2 * 264 * 88, rel=0.02), "both, whole, with their own sides"
    assert 200 < tall < 600
    more = draw(tmp_path / "more.png", root, names, heading="probably the end")
    assert more.shape[0] > pixels.shape[0]
    assert more.shape[1] == pixels.shape[1]


def test_chinese_titles_are_drawn_as_themselves(root: Path, tmp_path: Path) -> None:
    assert drawable("红色的水果") == "红色的水果"
    titles = ("红", "绿", "?")
    drawn = {title: draw(tmp_path / f"{ord(title)}.png", root, [], title=title).tobytes() for title in titles}
    assert len(set(drawn.values())) == 3
