"""What a process and all below it cost: memory, processor time, and wall time without the moments it was stopped."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import NamedTuple

_STOPPED_S = 5.0  # without a tick for so long, the process was suspended, not slow


class Reading(NamedTuple):
    """A moment.

    Attributes:
        seconds: wall time since the meter started, without what it was stopped.
        cpu_s: processor time of the family, of those that have ended included.
    """

    seconds: float
    cpu_s: float


class FamilyMeter:
    """Watches this process and everything below it.

    Attributes:
        peak: the most memory held at a time, shared pages counted once, bytes.
        stopped_s: how long the process was suspended, as on a machine that is wanted for something else.
    """

    def __init__(self, interval_s: float = 0.5) -> None:
        self.peak = 0
        self.stopped_s = 0.0
        self._interval_s = interval_s
        self._started = self._last = time.perf_counter()
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> FamilyMeter:
        self._started = self._last = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._end.set()
        self._thread.join()

    def read(self) -> Reading:
        """Now."""
        with self._lock:
            now = time.perf_counter()
            if now - self._last > _STOPPED_S:
                self.stopped_s += now - self._last
            self._last = now
            return Reading(now - self._started - self.stopped_s, sum(map(_cpu_s, _family(os.getpid()))))

    def _watch(self) -> None:
        while not self._end.wait(self._interval_s):
            self.read()
            self.peak = max(self.peak, sum(map(_proportional_bytes, _family(os.getpid()))))


def _family(root: int) -> list[int]:
    """A process and all below it."""
    parents = {
        int(entry.name): int(fields[1])
        for entry in os.scandir("/proc")
        if entry.name.isdigit() and (fields := _stat(int(entry.name)))
    }
    members = {root}
    while more := {pid for pid, parent in parents.items() if parent in members} - members:
        members |= more
    return sorted(members)


def _stat(pid: int) -> list[str]:
    """Fields behind the name, from the state on; none if it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def _cpu_s(pid: int) -> float:
    """Of the process and of the children that it has seen end."""
    return sum(map(int, _stat(pid)[11:15])) / os.sysconf("SC_CLK_TCK")


def _proportional_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
