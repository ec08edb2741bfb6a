"""What the loading of data does at the moment, visible from other processes, and how long each stage took so far.

Every worker writes its stage ("reading", "/data/000007.tar") into a slot of shared memory, so that whoever waits for it
can say what it waits for. The same calls measure the stages, at about a microsecond each.
"""

from __future__ import annotations

import struct
import time
from multiprocessing.sharedctypes import RawArray
from typing import NamedTuple

READING, DECODING, TRANSFORMING, TOKENISING, IDLE = "reading", "decoding", "transforming", "tokenising", "idle"
"""Stages. Collating is part of tokenising: stacking pixels takes microseconds."""

STAGES = (READING, DECODING, TRANSFORMING, TOKENISING)
"""Stages that take time; the names in metrics."""

_SLOT_BYTES = 512
_HEAD = struct.Struct("<dH")


class StageNow(NamedTuple):
    """What a worker does."""

    stage: str  # one of the stages
    detail: str  # of what, such as a shard
    seconds: float  # since when, monotonic clock of the machine

    def describe(self) -> str:
        """In words, such as "reading /data/000007.tar for 63 s"."""
        return f"{self.stage} {self.detail} for {self.seconds:.0f} s".replace("  ", " ")


class StageBoard:
    """One slot per worker, in memory that worker processes share.

    Args:
        workers: number of slots.
    """

    def __init__(self, workers: int) -> None:
        self._memory = RawArray("c", max(1, workers) * _SLOT_BYTES)

    def write(self, worker: int, stage: str, detail: str) -> None:
        """Say what a worker does now; what does not fit its slot is cut."""
        text = f"{stage} {detail}".encode("utf-8", "replace")[: _SLOT_BYTES - _HEAD.size]
        start = worker * _SLOT_BYTES
        self._memory[start : start + _HEAD.size + len(text)] = _HEAD.pack(time.monotonic(), len(text)) + text

    def read(self, worker: int) -> StageNow:
        """What a worker does now."""
        slot = bytes(self._memory[worker * _SLOT_BYTES : (worker + 1) * _SLOT_BYTES])
        since, length = _HEAD.unpack_from(slot)
        stage, _, detail = slot[_HEAD.size : _HEAD.size + length].decode(errors="replace").partition(" ")
        return StageNow(stage or "starting", detail, time.monotonic() - since if since else 0.0)


class StageClock:
    """Tells a board which stage a worker enters, and adds up the time between.

    Args:
        board: where to tell; None only measures.
        worker: slot on the board.
    """

    def __init__(self, board: StageBoard | None = None, worker: int = 0) -> None:
        self._board = board
        self._worker = worker
        self._stage = IDLE
        self._entered = time.perf_counter()
        self._seconds = dict.fromkeys(STAGES, 0.0)

    def enter(self, stage: str, detail: str = "") -> None:
        """Leave the current stage for another one."""
        now = time.perf_counter()
        if self._stage != IDLE:
            self._seconds[self._stage] += now - self._entered
        self._stage, self._entered = stage, now
        if self._board is not None:
            self._board.write(self._worker, stage, detail)

    def take(self) -> dict[str, float]:
        """Seconds in each of `STAGES` since the last call; the worker is idle from now on."""
        self.enter(IDLE)
        taken, self._seconds = self._seconds, dict.fromkeys(STAGES, 0.0)
        return taken
