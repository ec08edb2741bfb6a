"""The table of faults in the documentation: made by injecting each of them and running."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support.fault_commands import Ended, Fatal, end, fatals
from tests.support.fault_runs import BATCH, STEPS, Outcome, damaged_set, run_ranks
from tests.support.faults import Fault, faults

DOCUMENT = Path("docs") / "data_faults.md"
COMMAND = "python -m scripts.make_fault_table"
_SHOWN = 100  # characters of a message
_INTRODUCTION = """\
# What happens to bad data

Each fault below was injected into real shards (two sources, mixed two to one, {samples} samples in {steps} steps) and
a run was started on them. Unusable samples are replaced by others of the same source, the same ones for any number of
ranks and workers; each is listed once in the run's `bad_samples.jsonl` and counted as `data/skipped/<reason>` in its
metrics. What headers tell is counted at the start; the rest whenever it is drawn, also as a replacement, so a sample of
a small set counts several times. What ends a run is one line on stderr, with exit code 2.

This file is written by `{command}`; a test compares it with a run of its own.
"""
_HEADS = {
    "A run goes on": ("fault", "what is listed, first entry", "entries", "counted", "full batches"),
    "A run ends": ("fault", "what is said", "exit code"),
}


class Row(NamedTuple):
    """One line of the table; `message` depends on versions and machines in small ways."""

    name: str
    message: str
    rest: tuple[str, ...]


def survivor_row(fault: Fault, outcome: Outcome, folder: Path) -> Row:
    """Of a fault that a run survives."""
    first = outcome.listed[0]
    place = first["shard"] + (f":{first['key']}" if first["key"] is not None else "")
    drawn, at_start = (
        ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
        for counts in (outcome.drawn, outcome.at_start)
    )
    full = sum(len(keys) == BATCH and all(keys) for keys in outcome.keys)
    counted = drawn or f"{at_start} at the start"
    return Row(
        fault.name,
        shorten(f"{place}: {first['reason']} ({first['detail']})", folder),
        (str(len(outcome.listed)), counted, f"{full} of {STEPS}"),
    )


def fatal_row(fatal: Fatal, ended: Ended, folder: Path) -> Row:
    """Of a fault that ends a run."""
    said = next(line for line in ended.err.splitlines() if line.startswith("m2-train: "))
    return Row(fatal.name, shorten(said.removeprefix("m2-train: "), folder), (str(ended.code),))


def shorten(message: str, folder: Path) -> str:
    """The beginning of a message without what is this machine's and this moment's."""
    message = message.replace(f"{folder}/", "")
    for pattern, text in (
        (r"http://127\.0\.0\.1:\d+", "http://host"),
        (r"pid\(s\) \d+", "pid(s) N"),
        (r"0x[0-9a-f]+", "0xN"),
    ):
        message = re.sub(pattern, text, message)
    return message if len(message) <= _SHOWN else f"{message[:_SHOWN]}…"


def run_all(folder: Path) -> Iterator[tuple[str, Row]]:
    """Inject and run everything; gives rows with their heading."""
    for number, fault in enumerate(faults()):
        place = folder / f"survived{number}"
        with damaged_set(place, fault) as (values, server):
            outcome = run_ranks(values, place, place / "run", fault, server=server)
        yield "A run goes on", survivor_row(fault, outcome, place)
    for number, fatal in enumerate(fatals()):
        place = folder / f"ended{number}"
        yield "A run ends", fatal_row(fatal, end(fatal, place), place)


def render(rows: list[tuple[str, Row]]) -> str:
    """The document."""
    parts = [_INTRODUCTION.format(samples=STEPS * BATCH, steps=STEPS, command=COMMAND)]
    for heading, head in _HEADS.items():
        own = [row for where, row in rows if where == heading]
        lines = [head, ("---",) * len(head), *((row.name, f"`{row.message}`", *row.rest) for row in own)]
        parts.append(f"## {heading}\n\n" + "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines) + "\n")
    return "\n".join(parts)


def read_rows(document: str) -> dict[str, Row]:
    """The rows of the document by fault."""
    rows = {}
    for line in document.splitlines():
        cells = [cell.replace("\\|", "|").strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and cells[0] not in {"fault", "---"}:
            rows[cells[0]] = Row(cells[0], cells[1].strip("`"), tuple(cells[2:]))
    return rows


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
