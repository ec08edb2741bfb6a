"""Results on the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from m2_encoder.evaluation.table import CHANCE, DIRECTIONS, Results, format_percent, table_rows

_WIDTH_WITHOUT_TERMINAL = 110


def open_console() -> Console:
    """A console on standard output that does not fold tables when it writes to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH_WITHOUT_TERMINAL)


def results_table(results: Results, *, titles: Mapping[str, str]) -> Table:
    """Per split a row for each language and one for chance, in percent.

    Args:
        results: by split and language.
        titles: what a split is called; its name where there is none.
    """
    rows = table_rows(results)
    table = Table(
        title="Retrieval, percent", title_justify="left", title_style="bold", header_style="bold", box=box.SIMPLE_HEAD
    )
    table.add_column("\nsplit", no_wrap=True)
    table.add_column("\nlanguage")
    for name in rows[0].values:
        direction, _, k = name.partition("_r@")
        heading = DIRECTIONS[direction] if k == "1" else ""
        table.add_column("\nmean" if name == "mean_recall" else f"{heading}\nR@{k}", justify="right")
    previous = None
    notes: list[str] = []
    for row in rows:
        if row.split != previous:
            if previous is not None:
                table.add_section()
            notes = [titles.get(row.split, row.split), f"{row.num_images:,} images"]
        previous = row.split
        note = notes.pop(0) if notes else ""
        style = "dim" if row.language == CHANCE else ""
        first = Text(note, style="bold" if notes else "dim")
        numbers = [Text(format_percent(value), style=style) for value in row.values.values()]
        table.add_row(first, Text(row.language, style=style), *numbers)
    return table
