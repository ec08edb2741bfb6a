"""Tables of results, in Markdown and on the terminal."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from m2_encoder.errors import MAX_ENTRIES, abridge

if TYPE_CHECKING:
    from rich.console import Console

CHANCE = "chance"
"""The "language" of the row of a random order, or how it begins where languages differ."""

DIRECTIONS = {"t2i": "text → image", "i2t": "image → text"}
"""Titles of the directions of retrieval."""

SPLIT_TITLES: Mapping[str, str] = {
    "heldout_style": "unseen style",
    "heldout_families": "unseen concepts and style",
    "val": "validation: unseen concepts",
    "val_style": "validation: unseen concepts and style",
    "train": "training set",
}
"""Titles of the splits of the built-in set."""

Results = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Set -> language -> what `retrieval_metrics` returns."""

_MAX_TITLE = 80  # characters of a set's title on the terminal
_TITLE_WIDTH = 18  # of a split's title, so that the table fits 80 columns
_LABEL_WIDTH = 22  # that labels get at least
_WIDTH_WITHOUT_TERMINAL = 110
_ENDLESS = 1000  # columns that no table needs


class ResultRow(NamedTuple):
    """One line of a `ResultTable`."""

    split: str  # key of the set
    cells: Sequence[str]  # one for each heading
    is_dim: bool = False  # for rows that only compare


class ResultTable(NamedTuple):
    """A table for the terminal, its first column for the set."""

    title: str  # line above it
    headings: Sequence[str]  # of the other columns; may have two lines
    rows: Sequence[ResultRow]  # those of one set are neighbours
    num_labels: int = 1  # leading ones that hold words, on the left; numbers are on the right
    caption: str | None = None  # line below it


class CellTable(NamedTuple):
    """A table of cells for the terminal."""

    title: str  # line above it
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]  # a cell for each heading
    num_labels: int = 1  # leading columns that hold words, on the left; numbers are on the right
    notes: Sequence[str] = ()  # lines below it


def print_cells(console: Console, table: CellTable) -> None:
    """Prints a table of cells, none of them cut; a label that repeats the one above is left out."""
    from rich import box
    from rich.measure import Measurement
    from rich.table import Table

    shown = Table(title=table.title, title_justify="left", title_style="bold", header_style="bold", box=box.SIMPLE_HEAD)
    shown.padding, shown.pad_edge, shown.collapse_padding = (0, 1), False, True
    for number, heading in enumerate(table.headings):
        widest = max((len(row[number]) for row in table.rows), default=0)
        if number < table.num_labels:
            shown.add_column(heading, overflow="fold", min_width=min(widest, _LABEL_WIDTH))
        else:
            shown.add_column(heading, justify="right", min_width=widest)
    before: Sequence[str] = ()
    for row in table.rows:
        same = next((n for n, (a, b) in enumerate(zip(row, before, strict=False)) if a != b), 0)
        shown.add_row(*("" if n < min(same, table.num_labels - 1) else cell for n, cell in enumerate(row)))
        before = row
    needed = Measurement.get(console, console.options.update(width=_ENDLESS), shown)
    shown.width = max(needed.minimum, min(needed.maximum, console.width if console.is_terminal else _ENDLESS))
    console.print(shown, crop=False)
    for note in table.notes:
        console.print(f"  {abridge(note)}", style="dim", soft_wrap=True, highlight=False)


def open_console() -> Console:
    """A console on standard output, wide enough for tables if that is no terminal.

    What is printed is text as it is: names of users may look like markup, `[/INST]`, or like an emoji, `:cat:`.
    """
    from rich.console import Console

    console = Console(markup=False, emoji=False)
    return console if console.is_terminal else Console(width=_WIDTH_WITHOUT_TERMINAL, markup=False, emoji=False)


def print_table(
    console: Console, table: ResultTable, *, num_images: Mapping[str, int], titles: Mapping[str, str]
) -> None:
    """Prints a table; the title of a set is wrapped beside its rows. `num_images` and `titles` are by set."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(
        title=table.title,
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        caption=table.caption,
        caption_justify="left",
        caption_style="dim",
    )
    shown.add_column("\nsplit", no_wrap=True)
    for number, heading in enumerate(table.headings):
        shown.add_column(
            heading if "\n" in heading else f"\n{heading}", justify="left" if number < table.num_labels else "right"
        )
    groups = [(split, list(rows)) for split, rows in itertools.groupby(table.rows, key=lambda row: row.split)]
    for split, rows in groups if len(groups) <= MAX_ENTRIES else groups[: MAX_ENTRIES - 1]:
        lines = textwrap.wrap(abridge(titles[split], _MAX_TITLE), _TITLE_WIDTH)
        notes = [*(Text(line, style="bold") for line in lines), Text(f"{num_images[split]:,} images", style="dim")]
        for note, row in itertools.zip_longest(notes, rows):
            shown.add_row(note, *([Text(cell, style="dim" if row.is_dim else "") for cell in row.cells] if row else []))
        shown.add_section()
    if len(groups) > MAX_ENTRIES:
        shown.add_row(f"… and {len(groups) - MAX_ENTRIES + 1:,} more")
    console.print(shown)


def tabulate(results: Results) -> dict[str, dict[str, dict[str, float]]]:
    """Recalls in percent: by set, then language with chance last, then `t2i_r@1` and so on.

    Chance is one row where it is the same in all languages, otherwise `chance en` and so on.
    """
    table: dict[str, dict[str, dict[str, float]]] = {}
    for split, languages in results.items():
        first = next(iter(languages.values()))
        names = [name for direction in DIRECTIONS for name in first if name.startswith(f"{direction}_r@")]
        table[split] = {
            language: {name: metrics[name] for name in [*names, "mean_recall"]}
            for language, metrics in languages.items()
        }
        table[split] |= _chances(languages, names)
    return table


def _chances(languages: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    found = {}
    for language, metrics in languages.items():
        if all(name.replace("_r@", "_chance@") in metrics for name in names):
            chance = {name: metrics[name.replace("_r@", "_chance@")] for name in names}
            found[f"{CHANCE} {language}"] = chance | {"mean_recall": sum(chance.values()) / len(chance)}
    first, *others = found.values()
    return {CHANCE: first} if all(other == first for other in others) else found


def results_table(results: Results) -> ResultTable:
    """Retrieval for the terminal: per split a row for each language and one for chance, in percent."""
    rows = [
        ResultRow(split, (language, *map(format_percent, values.values())), is_dim=language.startswith(CHANCE))
        for split, languages in tabulate(results).items()
        for language, values in languages.items()
    ]
    words: dict[str, list[str]] = {}
    for direction, title in DIRECTIONS.items():
        before, arrow, after = title.partition(" → ")
        words[direction] = [before + arrow.rstrip(), after]
    headings = ["\n"]
    for direction, k in _columns(results):  # a direction's words spread over its columns
        headings.append(f"{words[direction].pop(0) if words[direction] else ''}\nR@{k}")
    return ResultTable("Retrieval, percent", [*headings, "\nmean"], rows)


def markdown_table(results: Results, titles: Mapping[str, str]) -> str:
    """Retrieval for a README or a model card, in percent; `titles` are by set."""
    columns = [f"{DIRECTIONS[direction]} R@{k}" for direction, k in _columns(results)]
    header = ["split", "images", "language", *columns, "mean"]
    lines = [header, ["---", "--:", "---"] + ["--:"] * (len(header) - 3)]
    for split, languages in tabulate(results).items():
        number = int(next(iter(results[split].values()))["num_images"])
        start = [titles[split], f"{number:,}"]
        for language, values in languages.items():
            mark = "*" if language.startswith(CHANCE) else ""
            lines.append(
                [*start, *(f"{mark}{cell}{mark}" for cell in (language, *map(format_percent, values.values())))]
            )
            start = ["", ""]
    return to_markdown(lines) + "\n"


def _columns(results: Results) -> list[tuple[str, str]]:
    """Direction and k of each column of recalls."""
    names = next(iter(next(iter(results.values())).values()))
    return [
        (direction, name.partition("_r@")[2])
        for direction in DIRECTIONS
        for name in names
        if name.startswith(f"{direction}_r@")
    ]


def split_title(name: str, split: str) -> str:
    """Title of a set in tables and pictures: of `split` of the built-in set, or its name where that is ""."""
    return SPLIT_TITLES.get(split, name)


def format_percent(value: float) -> str:
    """One decimal, two below one percent, where chance is."""
    return f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def to_markdown(lines: Iterable[Sequence[str]]) -> str:
    """A table of cells: header, rule (`---`, `--:`), and rows."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells_to_markdown(table: CellTable) -> str:
    """The table in Markdown, below its title."""
    rule = ["---" if number < table.num_labels else "--:" for number in range(len(table.headings))]
    return f"**{table.title}**\n\n{to_markdown([table.headings, rule, *table.rows])}\n"


def replace_section(text: str, name: str, content: str) -> str:
    """Replaces what is between `<!-- name:begin -->` and `<!-- name:end -->`.

    Raises:
        ValueError: unless each marker is there exactly once, in order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the document must hold {begin} and then {end}, once each")
    head, rest = text.split(begin)
    return f"{head}{begin}\n\n{content.strip()}\n\n{end}{rest.split(end)[1]}"
