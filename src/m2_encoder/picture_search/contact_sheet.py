"""Pictures that were found, drawn on a page with their names and scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from m2_encoder.data.images.opening import read_picture_file
from m2_encoder.data.images.transforms import open_image
from m2_encoder.errors import ImageError
from m2_encoder.evaluation.pictures.drawing import (
    AMBER,
    GREEN,
    INK,
    LINE,
    PAGE,
    PANEL,
    SCALE,
    SOFT,
    Canvas,
    text_width,
    wrap_text,
)
from m2_encoder.pictures import STANDARD

MAX_PICTURES: Final = 200
"""On a page."""

_COLUMNS: Final = 6
_SIDE, _INSET, _GAP = 132, 6, 14
_CARD: Final = _SIDE + 2 * _INSET
_ROW_HEIGHT: Final = _CARD + 62
_MARGIN, _HEADER, _SECTION_HEAD = 36, 104, 34
_WIDTH: Final = 2 * _MARGIN + _COLUMNS * _CARD + (_COLUMNS - 1) * _GAP


class Cell(NamedTuple):
    """One picture of a page."""

    name: str  # below the root
    note: str  # beside its name, such as a score
    is_likely: bool = True


class Section(NamedTuple):
    """Pictures under a heading; "" for none."""

    title: str
    cells: Sequence[Cell]


def draw_sheet(path: Path, sections: Sequence[Section], *, root: Path, title: str, subtitle: str) -> None:
    """Draws pictures of a folder as a PNG; of one that cannot be read any more, the reason.

    Args:
        path: of the PNG; missing folders are made.
        sections: of the page, from above.
        root: the folder of the pictures.
        title: what was searched for; one line of it is drawn.
        subtitle: where, and how much was found.

    Raises:
        UserError: if the file cannot be written.
    """
    height = _HEADER + sum(map(_height, sections)) + _MARGIN
    canvas = Canvas(_WIDTH, height, background=PAGE)
    canvas.text(wrap_text(title, 24, _WIDTH - 2 * _MARGIN, max_lines=1)[0], _MARGIN, 52, 24, color=INK, bold=True)
    canvas.text(wrap_text(subtitle, 13, _WIDTH - 2 * _MARGIN, max_lines=1)[0], _MARGIN, 78, 13, color=SOFT)
    y = float(_HEADER)
    for section in sections:
        _draw_section(canvas, section, root, y)
        y += _height(section)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def _height(section: Section) -> int:
    return (_SECTION_HEAD if section.title else 0) + -(-len(section.cells) // _COLUMNS) * _ROW_HEIGHT


def _draw_section(canvas: Canvas, section: Section, root: Path, y: float) -> None:
    if section.title:
        end = canvas.text(section.title, _MARGIN, y + 14, 13, color=AMBER)
        canvas.box(end + 12, y + 9, _WIDTH - _MARGIN - end - 12, 1, fill=LINE)
        y += _SECTION_HEAD
    for number, cell in enumerate(section.cells):
        row, column = divmod(number, _COLUMNS)
        _draw_cell(canvas, cell, root, _MARGIN + column * (_CARD + _GAP), y + row * _ROW_HEIGHT)


def _draw_cell(canvas: Canvas, cell: Cell, root: Path, x: float, y: float) -> None:
    canvas.box(x, y, _CARD, _CARD, fill=PANEL, outline=LINE, radius=8)
    try:
        canvas.picture(_thumbnail(root / cell.name), x + _INSET, y + _INSET, _SIDE)
    except ImageError as error:
        for number, line in enumerate(wrap_text(error.text.removeprefix("image bytes: "), 11, _SIDE - 8, max_lines=4)):
            canvas.text(line, x + _CARD / 2, y + 60 + 15 * number, 11, color=AMBER, anchor="ms")
    color = GREEN if cell.is_likely else SOFT
    end = canvas.text(cell.note, x + 2, y + _CARD + 17, 11.5, color=color, bold=cell.is_likely)
    first = wrap_text(cell.name, 11, _CARD - 4, max_lines=2)
    if cell.note and text_width(cell.name, 11) < x + _CARD - end - 10:
        canvas.text(cell.name, end + 8, y + _CARD + 17, 11, color=SOFT)
        return
    for number, line in enumerate(first):
        canvas.text(line, x + 2, y + _CARD + (17 if not cell.note else 32) + 14 * number, 11, color=SOFT)


def _thumbnail(path: Path) -> Tensor:
    """The whole picture in the middle of a white square, (3, S, S) uint8.

    Raises:
        ImageError: if it cannot be read or decoded.
    """
    side = _SIDE * SCALE
    image = open_image(read_picture_file(path), pictures=STANDARD)
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    square = Image.new("RGB", (side, side), PANEL)
    square.paste(image.resize(size, Image.Resampling.LANCZOS), ((side - size[0]) // 2, (side - size[1]) // 2))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)
