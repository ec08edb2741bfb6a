"""Tables of faults in the documentation: made by injecting each of them and running."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

COMMAND = "python -m scripts.make_fault_table"


class Row(NamedTuple):
    """One line of a table; `message` depends on versions and machines in small ways."""

    name: str
    message: str
    rest: tuple[str, ...]


class Document(NamedTuple):
    """A file of tables.

    Attributes:
        path: in the checkout.
        introduction: what stands above the tables.
        heads: of the tables' columns, by the tables' headings.
    """

    path: Path
    introduction: str
    heads: Mapping[str, tuple[str, ...]]

    def render(self, rows: Iterable[tuple[str, Row]]) -> str:
        """Its text, of rows with their headings."""
        rows, parts = list(rows), [self.introduction]
        for heading, head in self.heads.items():
            own = [row for where, row in rows if where == heading]
            lines = [head, ("---",) * len(head), *((row.name, f"`{row.message}`", *row.rest) for row in own)]
            table = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
            parts.append(f"## {heading}\n\n{table}\n")
        return "\n".join(parts)


def shorten(message: str, folder: Path, *, shown: int) -> str:
    """The beginning of a message without what is this machine's and this moment's."""
    message = " ".join(message.split()).replace("`", "'").replace(f"{folder}/", "").replace(str(folder), ".")
    for pattern, text in (
        (r"http://127\.0\.0\.1:\d+", "http://host"),
        (r"pid\(s\) \d+", "pid(s) N"),
        (r"\bpid \d+ on [^,;)]+", "pid N on HOST"),
        (r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "since TIME"),
        (r"0x[0-9a-f]+", "0xN"),
        (r"(\.[\w=]+(?:\.ckpt)?)\.[0-9a-f]{8}(?=[./])", r"\1.N"),  # of a file that is not whole yet
        (r"\b[0-9a-f]{64}\b", "N"),
        (r"\bstep \d+ is saved", "step N is saved"),
        (r"\bat step \d+(?=[:)])", "at step N"),
        (r"run-\d{8}_\d{6}-[0-9a-f]{16}", "run-TIME-ID"),
        (r"run [0-9a-f]{16}", "run ID"),
    ):
        message = re.sub(pattern, text, message)
    return message if len(message) <= shown else f"{message[:shown]}…"


def read_rows(document: str) -> dict[str, Row]:
    """The rows of a document by fault."""
    rows = {}
    for line in document.splitlines():
        cells = [cell.replace("\\|", "|").strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and cells[0] not in {"fault", "---"}:
            rows[cells[0]] = Row(cells[0], cells[1].strip("`"), tuple(cells[2:]))
    return rows


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
