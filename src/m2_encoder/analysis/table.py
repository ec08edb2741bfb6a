"""Tables that print in a terminal and in a notebook, and that other tools read."""

from __future__ import annotations

import csv
import html
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from m2_encoder.evaluation.tables import to_markdown
from m2_encoder.files import write_text

_DIGITS = 4  # significant ones that are shown; files keep all


class Table(Sequence[Mapping[str, Any]]):
    """Rows of named values: a sequence of mappings, so that `pandas.DataFrame(table)` takes it."""

    def __init__(self, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
        """A table of rows, which may leave out columns.

        Args:
            columns: names, in order.
            rows: values by column.
        """
        self.columns = tuple(columns)
        self.rows = tuple({name: row.get(name) for name in self.columns} for row in rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        return Table(self.columns, self.rows[place]) if isinstance(place, slice) else self.rows[place]

    def column(self, name: str) -> list[Any]:
        """The values of one column.

        Raises:
            KeyError: if there is no such column.
        """
        if name not in self.columns:
            raise KeyError(f"no column {name!r}; there are {', '.join(self.columns)}")
        return [row[name] for row in self.rows]

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Writes all digits as CSV in UTF-8; returns the path."""
        written = io.StringIO()
        writer = csv.DictWriter(written, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(Path(path), written.getvalue())
        return Path(path)

    def to_markdown(self) -> str:
        """A table of Markdown, four significant digits."""
        lines = list(self._cells())
        rule = ["--:" if numeric else "---" for numeric in self._numeric()]
        return to_markdown([[cell.replace("|", "\\|") for cell in line] for line in (lines[0], rule, *lines[1:])])

    def __str__(self) -> str:
        lines = list(self._cells())
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        numeric = self._numeric()
        shown = [
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(line, widths, numeric, strict=True)
            ).rstrip()
            for line in lines
        ]
        return "\n".join([shown[0], "  ".join("-" * width for width in widths), *shown[1:]])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *body = ([html.escape(cell) for cell in line] for line in self._cells())
        styles = [' style="text-align:right"' if right else "" for right in self._numeric()]

        def line(tag: str, cells: Sequence[str]) -> str:
            row = "".join(f"<{tag}{style}>{cell}</{tag}>" for style, cell in zip(styles, cells, strict=True))
            return f"<tr>{row}</tr>"

        return (
            f"<table><thead>{line('th', head)}</thead><tbody>{''.join(line('td', row) for row in body)}</tbody></table>"
        )

    def _cells(self) -> Iterator[list[str]]:
        """Headings and rows as shown: a column `x ±` stands behind the values of `x`."""
        yield self._shown()
        for row in self.rows:
            spread = {name: show_value(row.get(f"{name} ±")) for name in self.columns}
            yield [show_value(row[name]) + (f" ± {spread[name]}" if spread[name] else "") for name in self._shown()]

    def _shown(self) -> list[str]:
        return [name for name in self.columns if name.removesuffix(" ±") == name or name[:-2] not in self.columns]

    def _numeric(self) -> list[bool]:
        return [any(_is_number(row[name]) for row in self.rows) for name in self._shown()]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def show_value(value: object) -> str:
    """A value for people, of four significant digits, whole above 10,000; nothing for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and 10**_DIGITS <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.{_DIGITS}g}" if isinstance(value, float) else str(value)
