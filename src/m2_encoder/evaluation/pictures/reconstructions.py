"""A page of images, each above its reconstruction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from m2_encoder.evaluation.pictures.drawing import INK, LINE, PAGE, PANEL, SOFT, Canvas

_MARGIN, _CARD, _GAP, _PADDING, _HEAD, _SECTION_HEAD, _LABEL = 40, 76, 10, 20, 96, 62, 92


class ReconstructedImages(NamedTuple):
    """Images of one set."""

    title: str  # what they are
    note: str  # numbers of the whole set
    original: Tensor  # (n, 3, S, S) uint8
    drawn: Tensor  # reconstructed, (n, 3, S, S) uint8


def draw_reconstructions(path: Path, sets: Sequence[ReconstructedImages], *, title: str, subtitle: str) -> None:
    """Draws a section for each set; all have the same number of images."""
    columns = max(len(shown.original) for shown in sets)
    inner = _LABEL + columns * _CARD + (columns - 1) * _GAP
    width = 2 * (_MARGIN + _PADDING) + inner
    section = _SECTION_HEAD + 2 * _CARD + _GAP + _PADDING
    canvas = Canvas(width, _HEAD + len(sets) * (section + _GAP) + _MARGIN - _GAP, background=PAGE)
    canvas.text(title, _MARGIN, 48, 23, color=INK, bold=True)
    canvas.text(subtitle, _MARGIN, 74, 12, color=SOFT)
    for number, shown in enumerate(sets):
        top = _HEAD + number * (section + _GAP)
        canvas.box(_MARGIN, top, width - 2 * _MARGIN, section, fill=PANEL, outline=LINE, radius=12)
        left = _MARGIN + _PADDING
        canvas.text(shown.title, left, top + 28, 15, color=INK, bold=True)
        canvas.text(shown.note, left, top + 47, 11, color=SOFT)
        for row, (label, images) in enumerate((("original", shown.original), ("from codes", shown.drawn))):
            y = top + _SECTION_HEAD + row * (_CARD + _GAP)
            canvas.text(label, left, y + _CARD / 2 + 4, 12, color=SOFT)
            for column, image in enumerate(images):
                canvas.picture(image, left + _LABEL + column * (_CARD + _GAP), y, _CARD)
    canvas.save(path)
