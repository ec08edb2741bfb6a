"""Ranks that watch each other: one that is stopped or dead does not keep the others waiting.

A collective call waits as long as its group's time-out allows, which has to be long: a rank may validate, compile or
save for many minutes. So each rank has a thread that says every second, through the key-value store of the run, that it
lives and where it is. A stopped process stops its thread, too; a busy one does not. The first rank looks at all others,
the others at the first one. A process that this one has started is seen to end at once.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Final, NamedTuple

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined,unused-ignore]

PERIOD_S: Final = 1.0
_LEFT: Final = "left"
_VERDICT: Final = "verdict"
_LAST_WORD_S: Final = 10.0  # to say that a rank leaves
_FAILING_S: Final = 5.0  # in which a rank meets by itself that another one has ended
_MISSED: Final = 3  # signs, after which a rank is taken for the one that has closed its connections

GOES_ON: Final = "The run ends; run.resume=auto goes on from its last checkpoint, which is whole, or from the start"


class Place(NamedTuple):
    """Where the store of a run is."""

    host: str
    port: int
    is_served: bool  # by somebody else than the first rank, such as torchrun's agent
    prefix: str  # of this start


class RankWatch:
    """The thread of one rank.

    Args:
        place: of the store.
        rank: this one.
        world_size: ranks.
        timeout_s: without a sign of life, after which a rank is given up.
        arrive_s: the same until its first sign.
        where: what this rank is doing, such as "step 12"; called by the thread.
        is_stopped: whether a rank that has not come yet is a stopped process, as far as this one can know.
        find_end: how the process of a rank has ended, in words; None if it has not, or did without an error, or this
            one cannot know.
        end: called in the thread with what there is to say, or None if another rank says it; it ends the process.
    """

    def __init__(
        self,
        place: Place,
        *,
        rank: int,
        world_size: int,
        timeout_s: float,
        arrive_s: float,
        where: Callable[[], str],
        is_stopped: Callable[[int], bool],
        find_end: Callable[[int], str | None],
        end: Callable[[str | None], None],
    ) -> None:
        self._place, self._rank, self._timeout_s, self._arrive_s = place, rank, timeout_s, arrive_s
        self._where, self._is_stopped, self._find_end, self._end = where, is_stopped, find_end, end
        self._watched = {other: _Signs() for other in (range(1, world_size) if rank == 0 else (0,))}
        self._op_s = max(PERIOD_S, min(10.0, timeout_s))
        self._verdict: int | None = None  # the rank that was given up, by the first one
        self._lost: list[str] = []  # who was given up while this rank waited for them to leave
        self._leaves, self._is_done = threading.Event(), threading.Event()
        # Two, as a call to a store whose process is stopped may not come back, whatever its time-out.
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._talk, self._judge)]

    def start(self) -> None:
        """Begin; the store must be there."""
        for thread in self._threads:
            thread.start()

    def leave(self, *, wait: bool) -> list[str]:
        """Say that this rank needs no other one any more, and stop watching.

        Args:
            wait: the first rank waits for the others, which need its store until they leave, too.

        Returns:
            What to say of those that have ended or fallen silent instead.
        """
        self._leaves.set()
        self._is_done.wait(self._timeout_s + 3 * PERIOD_S if wait else _LAST_WORD_S)
        self._is_done.set()
        return self._lost

    def explain_loss(self) -> str | None:
        """Which rank must have ended, now that a connection is closed, and how; waits some seconds for that to show."""
        deadline = time.monotonic() + _FAILING_S
        while time.monotonic() < deadline and not self._is_done.is_set():
            for other, signs in self._watched.items():
                end = self._find_end(other)
                if end is None and signs.text not in ("", _LEFT) and signs.silent_s >= _MISSED * PERIOD_S:
                    end = "has ended"
                if end is not None:
                    return self._describe(other, signs, end)
            time.sleep(0.05)
        return None

    def stop(self) -> None:
        """Say nothing more, as a rank that has failed; the others notice, if nothing else tells them."""
        self._is_done.set()

    def _talk(self) -> None:
        store: Store | None = None
        count = 0
        while not self._is_done.is_set():
            count += 1
            try:
                store = store or connect(self._place, timeout_s=self._op_s)
                self._exchange(store, count)
            except RuntimeError:  # the store's process is gone
                store = None  # what comes late would be taken for the next answer
            self._is_done.wait(PERIOD_S / 4 if self._leaves.is_set() else PERIOD_S)

    def _exchange(self, store: Store, count: int) -> None:
        """Give a sign, and read those of the others."""
        is_leaving = self._leaves.is_set()
        sign = {"count": count, "where": self._where(), "pid": os.getpid(), "host": socket.gethostname()}
        store.set(f"sign/{self._rank}", _LEFT if is_leaving else json.dumps(sign))
        if self._verdict is not None:
            store.set(_VERDICT, str(self._verdict))
        elif self._rank and store.check([_VERDICT]):
            self._finish(None)
        for other, signs in self._watched.items():
            if signs.text != _LEFT and store.check([f"sign/{other}"]):
                signs.note(store.get(f"sign/{other}").decode())
        if is_leaving and (self._rank or all(signs.text == _LEFT for signs in self._watched.values())):
            self._is_done.set()

    def _judge(self) -> None:
        """Count how long others are silent, and end the run if one is so for too long."""
        last = time.monotonic()
        while not self._is_done.wait(PERIOD_S):
            now = time.monotonic()
            # Not more than a round takes: after all processes were stopped, as by Ctrl-Z, nobody is late.
            elapsed, last = min(now - last, 2 * PERIOD_S), now
            for other, signs in self._watched.items():
                if signs.text == _LEFT or (self._rank and self._leaves.is_set()):
                    continue
                end = self._find_end(other)
                signs.silent_s += elapsed
                signs.ended_s += elapsed if end is not None else 0.0
                limit = self._timeout_s if signs.text or self._is_stopped(other) else self._arrive_s
                if signs.ended_s >= _FAILING_S or signs.silent_s >= limit:
                    self._give_up(other, signs, end)

    def _give_up(self, other: int, signs: _Signs, end: str | None) -> None:
        if end is None:
            end = f"has given no sign of life for {signs.silent_s:.0f} s"
        if self._leaves.is_set():  # nothing of it is needed any more
            self._lost.append(f"rank {other}{signs.describe()} {end}, after all steps were done")
            signs.text = _LEFT
            return
        if self._rank == 0:
            self._verdict = other
            time.sleep(2 * PERIOD_S)  # for the others to read it, before the store ends with this process
        self._finish(self._describe(other, signs, end))

    def _describe(self, other: int, signs: _Signs, end: str) -> str:
        text = f"at {self._where()}: rank {other}{signs.describe()} {end}. {GOES_ON}"
        if "no sign" in end:
            keys = f"strategy.rank_timeout_s{'' if signs.text else ' or strategy.start_timeout_s'}"
            text += f"; look at that process and its machine, or give {keys} more time"
        return text

    def _finish(self, text: str | None) -> None:
        if not self._is_done.is_set():
            self._is_done.set()
            self._end(text)


class _Signs:
    """What is known of another rank."""

    def __init__(self) -> None:
        self.text = ""  # its last sign
        self.silent_s = 0.0
        self.ended_s = 0.0  # since its process has

    def note(self, text: str) -> None:
        """Take what stands in the store."""
        if text != self.text:
            self.text, self.silent_s = text, 0.0

    def describe(self) -> str:
        """Who and where it was."""
        if not self.text:
            return " (not there yet)"
        sign = json.loads(self.text)
        return f" (pid {sign['pid']} on {sign['host']}, last seen at {sign['where']})"


def connect(place: Place, *, timeout_s: float) -> Store:
    """A connection of its own to the store of a run: threads that share one wait for each other."""
    store = TCPStore(place.host, place.port, None, False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
    return PrefixStore(place.prefix, store)


def serve(place: Place, *, world_size: int) -> Store:
    """The store of a run, in the process of the first rank."""
    store = TCPStore(place.host, place.port, world_size, True, wait_for_workers=False, multi_tenant=True)
    return PrefixStore(place.prefix, store)


def is_stopped_process(pid: int) -> bool:
    """Whether a process of this machine is stopped, by SIGSTOP; False where the kernel does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):
        return False


def describe_exit(code: int | None) -> str | None:
    """How a process has ended, by its exit code as of `subprocess`; None for 0, and while it lives."""
    if not code:
        return None
    if code > 0:
        return f"has ended with exit code {code}; what it said stands above, or in its own log"
    name = signal.Signals(-code).name
    return f"was killed by {name}{', often for want of memory' if -code == signal.SIGKILL else ''}"
