"""A canvas on Pillow: smooth boxes, ticks, pictures and bilingual text, measured in points.

A point is `SCALE` pixels, so that pages are sharp on screens of high density. Pillow's shapes have hard edges, so each
is drawn larger and reduced.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from m2_encoder.files import atomic_file

SCALE = 2
"""Pixels per point."""

_SMOOTHING = 4  # shapes are drawn this much larger, then reduced
_BOLD_STROKE_PX = 0.6  # the font has one weight; headings get a thin outline

Color = tuple[int, int, int]

PAGE: Color = (244, 246, 248)
PANEL: Color = (255, 255, 255)
LINE: Color = (224, 228, 234)
INK: Color = (23, 28, 36)
SOFT: Color = (104, 113, 126)
GREEN: Color = (22, 151, 88)
AMBER: Color = (176, 106, 12)
BLUE: Color = (42, 98, 196)

_INVISIBLE = ("Cc", "Cf", "Mn", "Me")  # categories of controls, joiners and accents of their own
_UNKNOWN = "\U000f0000"  # a character that no font has

LANGUAGE_NAMES = {"zh": "中文", "en": "English"}
"""Names of languages in pictures."""


class Canvas:
    """A page with its origin at the top left, in points."""

    def __init__(self, width: float, height: float, *, background: Color) -> None:
        self._image = Image.new("RGB", (round(width * SCALE), round(height * SCALE)), background)
        self._draw = ImageDraw.Draw(self._image)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: Color,
        outline: Color | None = None,
        line: float = 1.0,
        radius: float = 0.0,
    ) -> None:
        """A rectangle with round corners, its outline inside."""
        if outline is not None:
            self.box(x, y, width, height, fill=outline, radius=radius)
            x, y, width, height, radius = x + line, y + line, width - 2 * line, height - 2 * line, radius - line
        shape, pen = _shape(width, height)
        edge = (0, 0, shape.width - 1, shape.height - 1)
        pen.rounded_rectangle(edge, radius=max(radius, 0) * SCALE * _SMOOTHING, fill=255)
        self._paste_smooth(shape, x, y, fill)

    def badge(self, x: float, y: float, diameter: float, *, fill: Color) -> None:
        """A disc with a white tick."""
        disc, pen = _shape(diameter, diameter)
        side = disc.width
        pen.ellipse((0, 0, side - 1, side - 1), fill=255)
        self._paste_smooth(disc, x, y, fill)
        tick, pen = _shape(diameter, diameter)
        corners = [(0.27 * side, 0.52 * side), (0.44 * side, 0.68 * side), (0.74 * side, 0.35 * side)]
        pen.line(corners, fill=255, width=round(0.12 * side), joint="curve")
        self._paste_smooth(tick, x, y, (255, 255, 255))

    def picture(self, pixels: Tensor, x: float, y: float, side: float) -> None:
        """A square picture, (3, S, S) uint8; x and y are of its upper left corner."""
        array = np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy())
        size = round(side * SCALE)
        resized = Image.fromarray(array).resize((size, size), Image.Resampling.LANCZOS)
        self._image.paste(resized, (round(x * SCALE), round(y * SCALE)))

    def text(
        self, content: str, x: float, y: float, size: float, *, color: Color, anchor: str = "ls", bold: bool = False
    ) -> float:
        """One line of text; returns where it ends.

        Anchors are Pillow's: horizontally l, m or r, vertically s (baseline), m or a.
        """
        content = drawable(content)
        self._draw.text(
            (x * SCALE, y * SCALE),
            content,
            font=_font(size),
            fill=color,
            anchor=anchor,
            stroke_width=_BOLD_STROKE_PX * SCALE / 2 if bold else 0,
            stroke_fill=color,
        )
        return x + text_width(content, size)

    def save(self, path: Path) -> None:
        """Write a PNG, whole or not at all."""
        with atomic_file(path) as temporary:
            self._image.save(temporary, format="PNG")

    def _paste_smooth(self, shape: Image.Image, x: float, y: float, color: Color) -> None:
        place = (round(x * SCALE), round(y * SCALE))
        reduced = shape.reduce(_SMOOTHING)
        self._image.paste(color, (*place, place[0] + reduced.width, place[1] + reduced.height), reduced)


def _shape(width: float, height: float) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty mask of so many points, larger by `_SMOOTHING`, and its pen."""
    mask = Image.new("L", (round(width * SCALE * _SMOOTHING), round(height * SCALE * _SMOOTHING)))
    return mask, ImageDraw.Draw(mask)


def text_width(content: str, size: float) -> float:
    """Width of one line, in points."""
    return _font(size).getlength(drawable(content)) / SCALE


def drawable(content: str) -> str:
    """The text in characters that the font has, so that no empty box is drawn.

    Others become their compatible form (① is 1), without accents if need be, or "?"; invisible ones are left out, and
    line breaks are spaces.
    """
    return "".join(map(_drawable_character, content))


@lru_cache(maxsize=4096)
def _drawable_character(character: str) -> str:
    if character.isspace():
        return " "
    if unicodedata.category(character) in _INVISIBLE:
        return ""
    for form in (character, *(unicodedata.normalize(kind, character) for kind in ("NFKC", "NFKD"))):
        visible = [part for part in form if unicodedata.category(part) not in _INVISIBLE]
        if visible and all(map(_has_glyph, visible)):
            return "".join(visible)
    return "?"


@lru_cache(maxsize=4096)
def _has_glyph(character: str) -> bool:
    font = _font(12)
    return bytes(font.getmask(character)) != bytes(font.getmask(_UNKNOWN))


def wrap_text(content: str, size: float, width: float, *, max_lines: int) -> list[str]:
    """Breaks a text into lines: at spaces, between Chinese characters, or inside a word that is longer than a line.

    What does not fit into the lines becomes "…". `size` is that of the font; `width` is in points.
    """
    lines, current = [], ""
    pieces = _breakable(drawable(content))
    for token in (part for piece in pieces for part in ([piece] if text_width(piece, size) <= width else piece)):
        if current and text_width((current + token).rstrip(), size) > width:
            lines.append(current.rstrip())
            current = token.lstrip()
        else:
            current += token
    lines.append(current.rstrip())
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and text_width(last + "…", size) > width:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], last.rstrip() + "…"]
    return lines


def _breakable(content: str) -> Sequence[str]:
    """Unbreakable pieces: words with the space after them, or single Chinese characters."""
    pieces: list[str] = []
    for character in content:
        if pieces and character.isascii() and pieces[-1][-1].isascii() and pieces[-1][-1] != " ":
            pieces[-1] += character
        else:
            pieces.append(character)
    return pieces


@lru_cache(maxsize=32)
def _font(size: float) -> ImageFont.FreeTypeFont:
    with as_file(files("m2_encoder") / "assets" / "fonts" / "NotoSansSC-subset.ttf") as path:
        return ImageFont.truetype(str(path), round(size * SCALE))
