"""A page of queries in both languages, and the first images that a model finds for each.

Ranks are as pessimistic as in `metrics`: a wrong image with the same score ranks before the right one.

Letters: E feature dim · S image side in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from m2_encoder.data.retrieval_set import RetrievalSet
from m2_encoder.evaluation.encode import FeatureModel, Tokenize, encode_texts
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
from m2_encoder.evaluation.retrieval import SetFeatures

_NUM_HITS = 5  # images shown per query

_PILL: Color = (233, 239, 250)

_MARGIN, _PADDING, _COLUMN_GAP, _SECTION_GAP = 44, 28, 44, 22
_QUERY_WIDTH, _CARD, _INSET, _CARD_GAP = 164, 80, 8, 10
_ROW_HEIGHT, _HEADER_HEIGHT, _SECTION_HEAD, _FOOTER_HEIGHT = 124, 132, 84, 64
_LEGEND = "   ·   ".join(
    (
        "a picture that the query describes",
        "number under a picture: cosine of its feature and the query's",
        "rank: place of the first right picture; equal scores count against it",
    )
)
_COLUMN_WIDTH = _QUERY_WIDTH + _NUM_HITS * _CARD + (_NUM_HITS - 1) * _CARD_GAP


class Hit(NamedTuple):
    """An image that was found."""

    image: Tensor  # (3, S, S) uint8
    score: float  # cosine of image and query
    is_right: bool


class GalleryRow(NamedTuple):
    """A query and what it finds."""

    query: str
    hits: tuple[Hit, ...]  # the first images, best first
    rank: int | None  # rank of the best right image, from 1; None for a free query, which has no right one


class GallerySection(NamedTuple):
    """Queries against one set of images."""

    title: str  # what is asked of the model
    note: str  # what the images are
    columns: dict[str, tuple[GalleryRow, ...]]  # by language, rows of the same number
    figures: dict[str, str]  # by language, what stands over its column, such as its recalls
    num_images: int  # images searched


def find_concepts(
    dataset: RetrievalSet, features: SetFeatures, keys: Sequence[str]
) -> dict[str, tuple[GalleryRow, ...]]:
    """Searches for each key by its first caption; rows by language, those in which every key has one."""
    columns = {}
    for language, texts in features.texts.items():
        known = set(texts.ids.tolist())
        if not all(int(features.image_ids[dataset.keys.index(key)]) in known for key in keys):
            continue
        rows = []
        for key in keys:
            number = features.image_ids[dataset.keys.index(key)]
            index = int((texts.ids == number).nonzero()[0])
            right = features.image_ids == number
            rows.append(_search(texts.texts[index], texts.features[index], dataset, features, right))
        columns[language] = tuple(rows)
    return columns


def find_freely(
    model: FeatureModel,
    tokenizer: Tokenize,
    dataset: RetrievalSet,
    features: SetFeatures,
    queries: Mapping[str, tuple[str, ...]],
) -> dict[str, tuple[GalleryRow, ...]]:
    """Rows for queries by language that are no captions and have no single right image."""
    columns = {}
    for language, texts in queries.items():
        encoded = encode_texts(model, texts, tokenizer)
        columns[language] = tuple(
            _search(text, feature, dataset, features, None) for text, feature in zip(texts, encoded, strict=True)
        )
    return columns


def draw_gallery(path: Path, sections: Sequence[GallerySection], *, title: str, subtitle: str) -> None:
    """Draws the page as a PNG; every language of a section has the same number of rows."""
    num_columns = max(len(section.columns) for section in sections)
    columns = num_columns * _COLUMN_WIDTH + (num_columns - 1) * _COLUMN_GAP
    words = [(title, 30), (subtitle, 15), (_LEGEND, 13), *((section.note, 13.5) for section in sections)]
    width = 2 * (_MARGIN + _PADDING) + max(columns, *(text_width(text, size) for text, size in words))
    height = _HEADER_HEIGHT + sum(_section_height(s) + _SECTION_GAP for s in sections) + _FOOTER_HEIGHT
    canvas = Canvas(width, height, background=PAGE)
    canvas.text(title, _MARGIN, 64, 30, color=INK, bold=True)
    canvas.text(subtitle, _MARGIN, 95, 15, color=SOFT)
    y = float(_HEADER_HEIGHT)
    for section in sections:
        _draw_section(canvas, section, y, width - 2 * _MARGIN)
        y += _section_height(section) + _SECTION_GAP
    _draw_legend(canvas, y + 14)
    canvas.save(path)


def _search(
    query: str, query_feature: Tensor, dataset: RetrievalSet, features: SetFeatures, right: Tensor | None
) -> GalleryRow:
    # Rounded, so that equal features tie although the product's last bits differ.
    scores = (features.image_features.double() @ query_feature.double()).mul(1e10).round().div(1e10)
    is_right = torch.zeros(len(scores), dtype=torch.bool) if right is None else right
    wrong_first = is_right.long().argsort(stable=True)
    order = wrong_first[scores[wrong_first].argsort(stable=True, descending=True)]
    hits = tuple(Hit(dataset.images[i], float(scores[i]), bool(is_right[i])) for i in order[:_NUM_HITS].tolist())
    rank = None if right is None else int(is_right[order].nonzero()[0]) + 1
    return GalleryRow(query, hits, rank)


def _section_height(section: GallerySection) -> int:
    num_rows = max(map(len, section.columns.values()))
    return _SECTION_HEAD + 40 + num_rows * _ROW_HEIGHT + 6


def _draw_section(canvas: Canvas, section: GallerySection, y: float, width: float) -> None:
    canvas.box(_MARGIN, y, width, _section_height(section), fill=PANEL, outline=LINE, radius=14)
    left = _MARGIN + _PADDING
    canvas.text(section.title, left, y + 40, 20, color=INK, bold=True)
    canvas.text(section.note, left, y + 64, 13.5, color=SOFT)
    for number, (language, rows) in enumerate(section.columns.items()):
        x = left + number * (_COLUMN_WIDTH + _COLUMN_GAP)
        _draw_column_head(canvas, language, section.figures.get(language, ""), x, y + _SECTION_HEAD)
        for index, row in enumerate(rows):
            _draw_row(canvas, row, x, y + _SECTION_HEAD + 44 + index * _ROW_HEIGHT, section.num_images)


def _draw_column_head(canvas: Canvas, language: str, figures: str, x: float, y: float) -> None:
    name = LANGUAGE_NAMES.get(language, language)
    pill_width = text_width(name, 13) + 20
    canvas.box(x, y, pill_width, 24, fill=_PILL, radius=12)
    canvas.text(name, x + pill_width / 2, y + 16.7, 13, color=BLUE, anchor="ms")
    canvas.text(figures, x + _COLUMN_WIDTH, y + 16.7, 13, color=SOFT, anchor="rs")
    canvas.box(x, y + 33, _COLUMN_WIDTH, 1, fill=LINE)


def _draw_row(canvas: Canvas, row: GalleryRow, x: float, y: float, num_images: int) -> None:
    lines = wrap_text(row.query, 17, _QUERY_WIDTH - 16, max_lines=3)
    baseline = y + _CARD / 2 - (len(lines) - 1) * 11 + (0 if row.rank is not None else 6)
    for number, line in enumerate(lines):
        canvas.text(line, x, baseline + number * 22, 17, color=INK)
    if row.rank is not None:
        found = row.rank <= len(row.hits)
        note = f"rank {row.rank}" if found else f"rank {row.rank:,} of {num_images:,}"
        canvas.text(note, x, baseline + len(lines) * 22, 12.5, color=GREEN if found else AMBER)
    for number, hit in enumerate(row.hits):
        _draw_card(canvas, hit, x + _QUERY_WIDTH + number * (_CARD + _CARD_GAP), y)


def _draw_card(canvas: Canvas, hit: Hit, x: float, y: float) -> None:
    outline, line = (GREEN, 2.5) if hit.is_right else (LINE, 1.0)
    canvas.box(x, y, _CARD, _CARD, fill=PANEL, outline=outline, line=line, radius=10)
    canvas.picture(hit.image, x + _INSET, y + _INSET, _CARD - 2 * _INSET)
    if hit.is_right:
        canvas.badge(x + _CARD - 15, y - 6, 21, fill=GREEN)
    color = GREEN if hit.is_right else SOFT
    canvas.text(f"{hit.score:.2f}", x + _CARD / 2, y + _CARD + 17, 12, color=color, anchor="ms")


def _draw_legend(canvas: Canvas, y: float) -> None:
    canvas.badge(_MARGIN, y - 4, 19, fill=GREEN)
    canvas.text(_LEGEND, _MARGIN + 28, y + 10.5, 13, color=SOFT)
