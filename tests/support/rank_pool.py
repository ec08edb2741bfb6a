"""Ranks that stay alive between tests: starting processes costs more than most of what they are asked to do."""

from __future__ import annotations

import multiprocessing
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any

import torch.distributed as dist

from tests.support.ranks import run_ranks

_ANSWER_S = 90.0


class Seat:
    """A rank's place in worlds and groups of neighbouring ranks, for every power of two.

    Worlds smaller than all ranks are groups of it, so that one pool serves all of them; ranks beyond take no part.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._groups: dict[int, dist.ProcessGroup] = {}
        size, total = 1, dist.get_world_size()
        while size <= total:
            for start in range(0, total, size):
                members = list(range(start, start + size))
                group = dist.new_group(members)  # every rank makes every group, in one order
                if rank in members:
                    self._groups[size] = group
            size *= 2

    def group(self, size: int) -> dist.ProcessGroup:
        """The group of `size` neighbours that this rank is in; with all ranks it is a world of its own."""
        return self._groups[size]


class RankPool:
    """`size` processes over gloo that answer calls until the pool is closed."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        self.size = size
        self._inboxes = [context.Queue() for _ in range(size)]
        self._answers: Any = context.Queue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, args=(folder,), daemon=True)
        self._thread.start()

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(seat, *args)` on every rank at once; what each returned, by rank."""
        for inbox in self._inboxes:
            inbox.put((function, args))
        results: dict[int, Any] = {}
        waited = 0.0
        while len(results) < self.size:
            try:
                rank, result, error = self._answers.get(timeout=0.5)
            except Empty:
                waited += 0.5
                assert self._failure is None, f"the ranks died: {self._failure}"
                assert waited < _ANSWER_S, f"only ranks {sorted(results)} answered within {_ANSWER_S} s"
                continue
            assert error is None, f"rank {rank}:\n{error}"
            results[rank] = result
        return [results[rank] for rank in range(self.size)]

    def close(self) -> None:
        """Let the processes end."""
        for inbox in self._inboxes:
            inbox.put(None)
        self._thread.join(timeout=30)

    def _serve(self, folder: Path) -> None:
        try:
            run_ranks(_answer, self.size, self._inboxes, self._answers, folder=folder, timeout_s=900)
        except BaseException as error:  # shown by the call that waits
            self._failure = error


def _answer(rank: int, inboxes: list[Any], answers: Any) -> None:
    seat = Seat(rank)
    while (job := inboxes[rank].get()) is not None:
        function, args = job
        try:
            answers.put((rank, function(seat, *args), None))
        except Exception:
            answers.put((rank, None, traceback.format_exc()))
