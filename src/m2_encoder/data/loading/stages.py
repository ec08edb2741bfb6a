"""The stage of each loader worker, such as ("reading", "/data/000007.tar"), in shared memory, and the time per stage.

Entering a stage takes about a microsecond.
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
    """Current stage of a worker."""

    stage: str  # one of the stages
    detail: str  # of what, such as a shard
    seconds: float  # since when, monotonic clock of the machine

    def describe(self) -> str:
        """Such as "reading /data/000007.tar for 63 s"."""
        return f"{self.stage} {self.detail} for {self.seconds:.0f} s".replace("  ", " ")


class StageBoard:
    """One slot per worker, in shared memory."""

    def __init__(self, workers: int) -> None:
        self._memory = RawArray("c", max(1, workers) * _SLOT_BYTES)
        self._made = time.monotonic()

    def write(self, worker: int, stage: str, detail: str) -> None:
        """Write a worker's stage, cut to fit its slot."""
        text = f"{stage} {detail}".encode("utf-8", "replace")[: _SLOT_BYTES - _HEAD.size]
        start = worker * _SLOT_BYTES
        self._memory[start : start + _HEAD.size + len(text)] = _HEAD.pack(time.monotonic(), len(text)) + text

    def read(self, worker: int) -> StageNow:
        """Current stage of a worker."""
        slot = bytes(self._memory[worker * _SLOT_BYTES : (worker + 1) * _SLOT_BYTES])
        since, length = _HEAD.unpack_from(slot)
        stage, _, detail = slot[_HEAD.size : _HEAD.size + length].decode(errors="replace").partition(" ")
        return StageNow(stage or "starting", detail, time.monotonic() - (since or self._made))


class StageClock:
    """Writes the stages of one worker to a board, if there is one, and adds up their times."""

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
