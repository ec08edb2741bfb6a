"""The table of faults of data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.support.fault_commands import Ended, Fatal, end, fatals
from tests.support.fault_runs import BATCH, STEPS, Outcome, damaged_set, run_ranks
from tests.support.fault_table import COMMAND, Document, Row, shorten
from tests.support.faults import Fault, faults

_SHOWN = 100  # characters of a message
DOCUMENT = Document(
    Path("docs") / "data_faults.md",
    f"""\
# What happens to bad data

Each fault below was injected into real shards (two sources, mixed two to one, {STEPS * BATCH} samples in {STEPS} steps)
and a run was started on them. Unusable samples are replaced by others of the same source, the same ones for any number
of ranks and workers; each is listed once in the run's `bad_samples.jsonl` and counted as `data/skipped/<reason>` in its
metrics. What headers tell is counted at the start; the rest whenever it is drawn, also as a replacement, so a sample of
a small set counts several times. What ends a run is one line on stderr, with exit code 2. Damaged files of runs,
foreign files and killed processes stand in [run_faults.md](run_faults.md).

This file is written by `{COMMAND}`; a test compares it with a run of its own.
""",
    {
        "A run goes on": ("fault", "what is listed, first entry", "entries", "counted", "full batches"),
        "A run ends": ("fault", "what is said", "exit code"),
    },
)


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
        shorten(f"{place}: {first['reason']} ({first['detail']})", folder, shown=_SHOWN),
        (str(len(outcome.listed)), counted, f"{full} of {STEPS}"),
    )


def fatal_row(fatal: Fatal, ended: Ended, folder: Path) -> Row:
    """Of a fault that ends a run."""
    said = next(line for line in ended.err.splitlines() if line.startswith("m2-train: "))
    return Row(fatal.name, shorten(said.removeprefix("m2-train: "), folder, shown=_SHOWN), (str(ended.code),))


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
