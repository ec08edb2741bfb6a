"""Rows of CSV and TSV files, quoted by RFC 4180 or with stray quotation marks.

`csv.reader` reads a quotation mark that is never closed up to the next one: a caption such as `"Big` in a TSV silently
costs the rows behind it. Here a line whose quotation is invalid is split at its delimiters alone.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Callable, Iterable, Iterator

_MAX_FIELD_CHARACTERS = 2**27  # an image in a field, as base64, fits
_MAX_LINES = 100  # of one row


def read_rows(lines: Iterable[str], delimiter: str) -> Iterator[tuple[str, ...]]:
    """Split lines into rows, the header first; blank lines are left out.

    A row has as many fields as its line, whatever the header has.
    """
    csv.field_size_limit(_MAX_FIELD_CHARACTERS)
    source = iter(lines)
    returned: deque[str] = deque()
    width = 0

    def take() -> str | None:
        return returned.popleft() if returned else next(source, None)

    while (line := take()) is not None:
        bare = line.rstrip("\r\n")
        if not bare:
            continue
        row = tuple(bare.split(delimiter))
        if '"' in bare:
            held = [line]
            quoted = _read_quoted(held, take, delimiter, width)
            returned.extendleft(reversed(held))
            row = quoted or row
        width = width or len(row)
        yield row


def _read_quoted(held: list[str], take: Callable[[], str | None], delimiter: str, width: int) -> tuple[str, ...] | None:
    """A row by RFC 4180, over several lines if need be; None if the first line is no such row.

    `held` starts with the first line and keeps those of later rows; `width` is 0 for the header itself.
    """
    while True:
        reader = csv.reader(held, delimiter=delimiter, strict=True)
        try:
            row = tuple(next(reader))
        except csv.Error:
            row = ()
        if row and (len(held) == 1 or len(row) == width or not width):
            del held[: reader.line_num]
            return row
        more = _take_to_quote(held, take, delimiter, width)
        if not more:
            del held[0]
            return None
        held += more


def _take_to_quote(held: list[str], take: Callable[[], str | None], delimiter: str, width: int) -> list[str]:
    """Lines up to the next one with a quotation mark; empty if they cannot complete the row."""
    text = "".join(held)
    if text.count('"') % 2 == 0:  # nothing is open: the row is wrong in itself
        return []
    more: list[str] = []
    while len(held) + len(more) < _MAX_LINES and (line := take()) is not None:
        more.append(line)
        text += line
        if delimiter == "\t" and width and text.count("\t") >= width:
            break  # a tab inside of quotation marks is rarer than a mark that means nothing
        if '"' in line:
            return more
    held += more
    return []
