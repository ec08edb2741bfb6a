"""Results on the terminal."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from m2_encoder.evaluation.tables import CHANCE, DIRECTIONS, Results, TableRow, format_percent, table_rows

_TITLE_WIDTH = 18  # of a line of a split's title: the table must fit a terminal of 80 columns


def results_table(results: Results, *, titles: Mapping[str, str]) -> Table:
    """Per split a row for each language and one for chance, in percent.

    Args:
        results: by split and language.
        titles: what a split is called; its name where there is none.
    """
    rows = table_rows(results)
    table = start_table("Retrieval, percent")
    table.add_column("\n")
    for heading in _headings(list(rows[0].values)):
        table.add_column(heading, justify="right")
    for split, group in itertools.groupby(rows, key=lambda row: row.split):
        numbers = list(group)
        title = [Text(line, style="bold") for line in textwrap.wrap(titles.get(split, split), _TITLE_WIDTH)]
        notes = [*title, Text(f"{numbers[0].num_images:,} images", style="dim")]
        for note, row in itertools.zip_longest(notes, numbers):
            table.add_row(note, *(_cells(row) if row else []))
        table.add_section()
    return table


def start_table(title: str, *, caption: str | None = None) -> Table:
    """A table of results without rows, its first column for the split."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        caption=caption,
        caption_justify="left",
        caption_style="dim",
    )
    table.add_column("\nsplit", no_wrap=True)
    return table


def _headings(names: Sequence[str]) -> list[str]:
    """Two lines over each number: a direction, whose words spread over its columns, and the cut-off."""
    words: dict[str, list[str]] = {}
    for direction, title in DIRECTIONS.items():
        before, arrow, after = title.partition(" → ")
        words[direction] = [before + arrow.rstrip(), after]
    headings = []
    for name in names:
        direction, separator, k = name.partition("_r@")
        left = words.get(direction, [])
        headings.append(f"{left.pop(0) if left else ''}\nR@{k}" if separator else "\nmean")
    return headings


def _cells(row: TableRow) -> list[Text]:
    style = "dim" if row.language == CHANCE else ""
    return [Text(text, style=style) for text in (row.language, *map(format_percent, row.values.values()))]
