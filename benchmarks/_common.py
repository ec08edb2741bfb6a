"""What every benchmark shares: arguments, machine and versions, interleaved timing, table, JSON.

A benchmark builds a `Report`, adds rows and figures, and calls `finish`. Times of several candidates come from
`interleave`: they take turns within one process, so that whatever else the machine does hits all of them alike.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def parse_arguments(description: str | None, *, configure: Callable[[Any], object] | None = None) -> Any:
    """Arguments that every benchmark takes, and applies the number of threads.

    Args:
        description: usually the module's docstring.
        configure: adds more arguments to the parser.

    Returns:
        Namespace with `quick`, `json` and `threads`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="at most two minutes on two cores; fewer rounds")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write machine, versions, rows and figures")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads (default: %(default)s)")
    if configure is not None:
        configure(parser)
    arguments = parser.parse_args()
    if arguments.threads < 1:
        parser.error(f"--threads {arguments.threads}: must be at least 1")
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json {arguments.json}: its folder does not exist")  # before minutes are spent measuring
    torch.set_num_threads(arguments.threads)
    return arguments


@dataclasses.dataclass(frozen=True)
class Timing:
    """Wall times of one candidate, one per round.

    Attributes:
        seconds: in the order of the rounds, which all candidates share.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median, seconds."""
        return statistics.median(self.seconds)

    def row(self) -> dict[str, float]:
        """Median, extremes and interquartile range in milliseconds, for a report."""
        quartiles = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else [self.median] * 3
        return {
            "median_ms": round(1e3 * self.median, 3),
            "min_ms": round(1e3 * min(self.seconds), 3),
            "max_ms": round(1e3 * max(self.seconds), 3),
            "iqr_ms": round(1e3 * (quartiles[2] - quartiles[0]), 3),
            "rounds": len(self.seconds),
        }


def interleave(candidates: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Time candidates in turns; every second round goes backwards, so that nobody always follows the same one.

    Args:
        candidates: label to a call that does the whole work, synchronised if it runs on an accelerator.
        rounds: measured calls of each.
        warmup: unmeasured calls of each before that; 0 where a check has called them already.

    Returns:
        Label to times.
    """
    seconds: dict[str, list[float]] = {label: [] for label in candidates}
    order = list(candidates)
    for i in range(-warmup, rounds):
        for label in order if i % 2 == 0 else reversed(order):
            start = time.perf_counter()
            candidates[label]()
            elapsed = time.perf_counter() - start
            if i >= 0:
                seconds[label].append(elapsed)
    return {label: Timing(tuple(values)) for label, values in seconds.items()}


def speedup(peer: Timing, ours: Timing) -> float:
    """Median over rounds of the peer's time over ours: both numbers of a round saw the same machine."""
    return statistics.median(p / o for p, o in zip(peer.seconds, ours.seconds, strict=True))


class PeakMemory:
    """Peak of this process's memory above what it held when the block began, bytes."""

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """Start anew; what earlier calls freed goes back to the system, or later ones would seem to need less."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
        before = self._read("VmRSS")
        yield
        self.bytes = self._read("VmHWM") - before

    @staticmethod
    def _read(field: str) -> int:
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return 1024 * int(found[1])


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "load_before": round(os.getloadavg()[0], 2),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def versions(*distributions: str) -> dict[str, str | None]:
    """Python and installed versions; None for what is not installed."""
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions()}
    names = ("m2-encoder", "torch", *distributions)
    return {"python": platform.python_version(), **{name: installed.get(name.lower()) for name in names}}


class Report:
    """Rows and figures of one run.

    Args:
        title: first line of the output.
        distributions: whose versions matter besides torch's.
    """

    def __init__(self, title: str, *, distributions: Sequence[str] = ()) -> None:
        self.title = title
        self.machine = machine()
        self.versions = versions(*distributions)
        self.rows: list[dict[str, Any]] = []
        self.figures: dict[str, Any] = {}
        self.started = time.perf_counter()

    def add(self, what: str, **values: Any) -> None:
        """Add a row: what was measured, and its numbers."""
        self.rows.append({"what": what, **values})

    def finish(self, *, json_path: Path | None = None) -> None:
        """Print everything, and write it as one JSON object if asked to."""
        print(f"\n{self.title}")
        print(", ".join(f"{key} {value}" for key, value in self.machine.items() if value is not None))
        print(", ".join(f"{key} {value}" for key, value in self.versions.items() if value is not None) + "\n")
        print(format_tables(self.rows))
        print()
        for name, value in self.figures.items():
            print(f"{name}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}")
        print(f"({time.perf_counter() - self.started:.0f} s)")
        if json_path is not None:
            content = {
                "machine": self.machine,
                "versions": self.versions,
                "command": shlex.join(["python", *sys.argv]),
                "rows": self.rows,
                "figures": self.figures,
            }
            json_path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def format_tables(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned tables, one for each run of rows with the same columns; numbers to the right."""
    tables = []
    for columns, group in itertools.groupby(rows, key=tuple):
        lines = [columns, *([_cell(row[column]) for column in columns] for row in group)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        lines.insert(1, ["-" * width for width in widths])
        padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
        tables.append("\n".join("  ".join(line).rstrip() for line in padded))
    return "\n\n".join(tables)


def _cell(value: Any) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else str(value)
