"""The table of faults of runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from tests.support.fault_table import COMMAND, Document, Row, shorten
from tests.support.run_faults import evaluation, outside, processes, saved, settings
from tests.support.run_faults.case import STEPS, Place, RunFault, Told, line_of, write_base

_SHOWN = 260  # characters of a message
_HEAD = ("fault", "what is said", "exit code", "ends", "what is kept")


@cache
def rooms() -> Mapping[str, tuple[RunFault, ...]]:
    """All faults by their heading."""
    return {
        "Exports and weights": saved.exports(),
        "Checkpoints": saved.checkpoints(),
        "Saved configurations": settings.saved_configurations(),
        "Runs that go on with other settings": settings.resumed(),
        "Command lines": settings.settings(),
        "Two processes": processes.two(),
        "Processes that are ended": processes.ended(),
        "One of two ranks": processes.ranks(),
        "Folders of pictures": outside.files(),
        "Files as people have them": outside.people(),
        "Weights behind an address": outside.servers(),
        "Weights & Biases": outside.wandb(),
        "Evaluation sets": evaluation.sets(),
    }


DOCUMENT = Document(
    Path("docs") / "run_faults.md",
    f"""\
# What happens to damaged files, foreign files and killed processes

Each fault below was injected for real: into the checkpoints, the export or the folder of a run of {STEPS} steps that
has ended, into what it reads, or into the process itself. Then the command was started: `m2-train`, `m2-evaluate`,
`m2-export`, `m2-embed` or `m2-data pack`. What is shown is the line that says what happened, without folders, times
and process ids; nothing ends in a traceback. Exit code 2 is one line about what the user can mend, 1 that something was
left out and listed, 0 that the command did what was asked, 143 and 130 that it was told to end. "Ends" is the time
within which it has to be over, start and a continued run included. What is kept was looked up afterwards: "all files as
they were" is byte for byte.

Faults of training data stand in [data_faults.md](data_faults.md).

This file is written by `{COMMAND}`; a test compares it with a run of its own.
""",
    dict.fromkeys(rooms(), _HEAD),
)


def inject(fault: RunFault, folder: Path, base: Path) -> tuple[Told, Row, float]:
    """What came of a fault, its row, and the seconds that it took."""
    started = time.monotonic()
    told = fault.act(Place(folder, base))
    took = time.monotonic() - started
    said = shorten(line_of(told, fault.message), folder, shown=_SHOWN)
    return told, Row(fault.name, said, (str(told.code), f"within {fault.within_s} s", told.kept)), took


def run_all(folder: Path) -> Iterator[tuple[str, Row]]:
    """Inject everything; gives rows with their heading."""
    write_base(folder / "base")
    for heading, faults in rooms().items():
        for number, fault in enumerate(faults):
            _, row, took = inject(fault, folder / f"{heading} {number}", folder / "base")
            assert took < fault.within_s, f"{fault.name} took {took:.0f} s"
            yield heading, row
