"""Parallel maps: over processes with bounded memory, and over threads that may hang."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from m2_encoder.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

STALL_TIMEOUT_S = 600.0
"""Default time without any progress after which loading counts as stuck."""

_NAMED = 3  # items that a message names
_AHEAD = 2  # tasks per worker that wait or are done, so that no worker waits for the slowest


def default_workers() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_processes(
    function: Callable[[Task], Result], tasks: Iterable[Task], *, workers: int, preload: str
) -> Iterator[Result]:
    """Results in the order of the tasks, which may be endless: they are taken as workers become free.

    0 workers work in this process. `preload` names a module that is imported once, before workers are forked.

    Raises:
        UserError: if a worker dies.
    """
    if workers == 0:
        yield from map(function, tasks)
        return
    waiting: deque[Future[Result]] = deque()
    pool = open_pool(workers, preload=preload)
    try:
        for task in tasks:
            waiting.append(pool.submit(function, task))
            if len(waiting) >= workers * _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died, killed from outside or for want of memory; start again with fewer workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def open_pool(workers: int, *, preload: str) -> ProcessPoolExecutor:
    """Processes that are forked from a clean one, never from this one and its threads.

    They import `preload` once, before the fork, and end with this one however it ends, `kill -9` included.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)


def map_watched(
    work: Callable[[Task], Result],
    items: Sequence[Task],
    *,
    threads: int,
    timeout_s: float,
    describe: Callable[[Task], str | None],
) -> list[Result]:
    """Results of all items in their order, from threads that are left behind when one of them hangs.

    Raises:
        UserError: if an item takes longer than `timeout_s`, with its name by `describe`, unless that gives None.
    """
    waiting = deque(range(len(items)))
    done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
    begun: list[tuple[int, float] | None] = [None] * min(threads, len(items))

    def run(slot: int) -> None:
        while waiting:
            try:
                number = waiting.popleft()
            except IndexError:  # another thread was faster
                break
            begun[slot] = number, time.monotonic()
            try:
                done.put((number, work(items[number]), None))
            except BaseException as error:  # raised where it is waited for
                done.put((number, None, error))
        begun[slot] = None

    for slot in range(len(begun)):
        threading.Thread(target=run, args=(slot,), name="map-watched", daemon=True).start()
    results: dict[int, Any] = {}
    try:
        while len(results) < len(items):
            number, result, error = _take(done, begun, items, describe, timeout_s)
            if error is not None:
                raise error
            results[number] = result
    finally:
        waiting.clear()
    return [results[number] for number in range(len(items))]


def _take(
    done: queue.SimpleQueue[tuple[int, Any, BaseException | None]],
    begun: Sequence[tuple[int, float] | None],
    items: Sequence[Any],
    describe: Callable[[Any], str | None],
    timeout_s: float,
) -> tuple[int, Any, BaseException | None]:
    while True:
        try:
            return done.get(timeout=timeout_s)
        except queue.Empty:  # noqa: PERF203 - once per time-out
            now = time.monotonic()
            slow = [describe(items[item[0]]) for item in begun if item is not None and now - item[1] >= timeout_s]
            stuck = [name for name in slow if name is not None]
            if stuck:
                raise UserError(
                    f"looking at the shards stands still for {timeout_s:g} s: waiting for {', '.join(stuck[:_NAMED])}; "
                    "look at that disk, or give data.stall_timeout_s more time"
                ) from None


def _start_worker() -> None:
    """Initialise a process of a pool: it ends with its parent, however that ends, and leaves Ctrl-C to it."""
    # Ctrl-C reaches the whole group; the main process alone says so and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker starts as one"
    sentinel = parent.sentinel

    def end_with_parent() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
