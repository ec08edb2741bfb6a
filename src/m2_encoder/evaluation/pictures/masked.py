"""A page of what a model predicts for hidden patches and hidden words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from m2_encoder.evaluation.pictures.drawing import (
    AMBER,
    BLUE,
    GREEN,
    INK,
    LANGUAGE_NAMES,
    LINE,
    PAGE,
    PANEL,
    SOFT,
    Canvas,
    Color,
    text_width,
    wrap_text,
)

_GREEN_PILL: Color = (222, 243, 232)
_AMBER_PILL: Color = (251, 238, 214)

_MARGIN, _PADDING, _HEAD, _FOOT, _TITLES = 40, 24, 114, 54, 40
_CARD, _GAP, _ROW, _TEXT_WIDTH = 84, 12, 108, 430
_BLANK = "(blank)"


class Words(NamedTuple):
    """A stretch of a caption."""

    text: str  # visible, or predicted
    is_right: bool | None = None  # of predicted words; None for visible ones


class PredictedCaption(NamedTuple):
    """A caption and what a model predicts in it."""

    text: str
    words: tuple[Words, ...]  # with predicted ones; empty if none were hidden


class MaskedRow(NamedTuple):
    """An image with its captions."""

    pictures: Mapping[str, Tensor]  # by column, the same in every row, (3, S, S) uint8
    captions: Mapping[str, PredictedCaption]  # by language


def draw_masked_page(path: Path, rows: Sequence[MaskedRow], *, title: str, subtitle: str, note: str) -> None:
    """Draws pictures on the left and captions on the right; a line that is too long ends in "…".

    The subtitle stands below the title, and the note, what the images are, below that.
    """
    columns = list(rows[0].pictures)
    pictures_width = len(columns) * (_CARD + _GAP) - _GAP
    width = 2 * (_MARGIN + _PADDING) + pictures_width + 2 * _GAP + _TEXT_WIDTH
    height = _HEAD + _TITLES + len(rows) * _ROW + _FOOT
    canvas = Canvas(width, height, background=PAGE)
    canvas.text(title, _MARGIN, 46, 23, color=INK, bold=True)
    for text, y in ((subtitle, 72), (note, 91)):
        canvas.text(_shorten(text, 12.5, width - 2 * _MARGIN), _MARGIN, y, 12.5, color=SOFT)
    canvas.box(_MARGIN, _HEAD, width - 2 * _MARGIN, height - _HEAD - _FOOT, fill=PANEL, outline=LINE, radius=14)
    left = _MARGIN + _PADDING
    for number, column in enumerate(columns):
        x = left + number * (_CARD + _GAP) + _CARD / 2
        canvas.text(column, x, _HEAD + 26, 11.5, color=SOFT, anchor="ms")
    for number, row in enumerate(rows):
        y = _HEAD + _TITLES + number * _ROW
        for place, column in enumerate(columns):
            canvas.picture(row.pictures[column], left + place * (_CARD + _GAP), y, _CARD)
        _draw_captions(canvas, row.captions, left + pictures_width + 2 * _GAP, y)
    _draw_legend(canvas, height - _FOOT / 2)
    canvas.save(path)


def _draw_captions(canvas: Canvas, captions: Mapping[str, PredictedCaption], x: float, y: float) -> None:
    for number, (language, caption) in enumerate(captions.items()):
        top = y + 17 + number * 46
        canvas.text(LANGUAGE_NAMES.get(language, language), x, top, 11, color=BLUE)
        canvas.text(_shorten(caption.text, 12, _TEXT_WIDTH - 56), x + 56, top, 12, color=SOFT)
        end, limit = x + 56, x + _TEXT_WIDTH - text_width("…", 16)
        for words in caption.words:
            if end + _words_width(words) > limit:
                rest = _shorten(words.text, 16, limit - end) if words.is_right is None else "…"
                canvas.text(rest, end, top + 23, 16, color=INK)
                break
            end = _draw_words(canvas, words, end, top + 23)


def _shorten(text: str, size: float, width: float) -> str:
    return wrap_text(text, size, width, max_lines=1)[0]


def _words_width(words: Words) -> float:
    """Width of what `_draw_words` draws, at most."""
    is_visible = words.is_right is None
    return text_width(words.text, 16) if is_visible else text_width(words.text.strip() or _BLANK, 16) + 22


def _draw_words(canvas: Canvas, words: Words, x: float, y: float) -> float:
    if words.is_right is None:
        return canvas.text(words.text, x, y, 16, color=INK)
    text = words.text.strip() or _BLANK
    color, pill = (GREEN, _GREEN_PILL) if words.is_right else (AMBER, _AMBER_PILL)
    x += 4 if words.text.startswith(" ") else 2
    inner = text_width(text, 16) + 12
    canvas.box(x, y - 16.5, inner, 22, fill=pill, radius=6)
    canvas.text(text, x + 6, y, 16, color=color)
    return x + inner + (6 if words.text.endswith(" ") else 3)


def _draw_legend(canvas: Canvas, y: float) -> None:
    x: float = _MARGIN
    for color, pill, text in (
        (GREEN, _GREEN_PILL, "hidden words, predicted right"),
        (AMBER, _AMBER_PILL, "predicted wrong; the true caption stands above"),
    ):
        canvas.box(x, y - 9, 18, 14, fill=pill, outline=color, radius=4)
        x = canvas.text(text, x + 26, y + 2.5, 12, color=SOFT) + 24
