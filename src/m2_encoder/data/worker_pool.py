"""Work on many shards in several processes, with a bounded number of them in memory."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from m2_encoder.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

_AHEAD = 2  # tasks per worker that wait or are done, so that no worker waits for the slowest


def default_workers() -> int:
    """As many as there are processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_processes(
    function: Callable[[Task], Result], tasks: Iterable[Task], *, workers: int, preload: str
) -> Iterator[Result]:
    """Apply a function to tasks, in the order of the tasks; tasks are taken as workers become free.

    Args:
        function: of a module; it and tasks are sent to other processes.
        tasks: what to work on; may be endless or larger than the memory.
        workers: processes; 0 works in this one.
        preload: module that workers import once, before they are forked.

    Raises:
        UserError: if a worker dies; whatever `function` raises.
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

    They end with this one however it ends, `kill -9` included.

    Args:
        workers: how many, 1 or more.
        preload: module that is imported once, before they are forked.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)


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
