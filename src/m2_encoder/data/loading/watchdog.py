"""Waits for batches with a time-out, and reports what the workers were doing."""

from __future__ import annotations

import errno
import logging
import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader

from m2_encoder.data.loading.stages import IDLE, StageBoard
from m2_encoder.errors import UserError

logger = logging.getLogger(__name__)

_TIMED_OUT = "DataLoader timed out"  # how torch's message begins
POLL_S = 5.0
"""Time-out for a loader with workers: the interval at which it checks that they live."""

_RAISED = "Caught "  # how torch's message begins for what a worker raised
SHARED_MEMORY = "/dev/shm"
"""Where the operating system keeps memory that processes share."""

_TORCH_FILE = "</torch_"  # names torch's memory that processes share
_DIED = ("exited unexpectedly", "is killed by signal")


def watch(loader: DataLoader[Any], board: StageBoard, *, workers: int, timeout_s: float) -> Iterator[Any]:
    """Iterate over a loader, which needs `timeout=POLL_S` if it has workers.

    Without workers a thread iterates: a read from a disk that hangs cannot be interrupted, only abandoned.

    Raises:
        UserError: if no stage changes for `timeout_s`, or a worker died; with the workers' stages.
    """
    if workers:
        yield from _watch_workers(loader, board, workers, timeout_s)
    else:
        yield from _watch_thread(loader, board, timeout_s)


def _watch_workers(loader: DataLoader[Any], board: StageBoard, workers: int, timeout_s: float) -> Iterator[Any]:
    iterator = _start(loader)
    wait = _Wait(iterator, board, workers, timeout_s)
    try:
        while True:
            try:
                loaded = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                if wait.stall is not None:
                    raise UserError(wait.stall) from error
                if str(error).startswith(_TIMED_OUT):
                    continue
                cause = _translate(error, board, wait.processes)
                if cause is None:
                    raise
                raise cause from error
            wait.pause()
            yield loaded
            wait.begin()
    finally:
        wait.end()
        # Not left to the garbage collector: where that ends the queues first, workers never hear that they are to end,
        # and torch waits ten seconds for each.
        end: Callable[[], None] | None = getattr(iterator, "_shutdown_workers", None)
        if end is not None:
            end()


class _Wait:
    """Looks, in a thread, whether the workers of a loader move while a batch is waited for; ends them if they do not.

    A stopped worker would never hear that it is to end, which torch waits for at the end of a loader; and it keeps the
    memory of a batch that it has announced, for which torch waits without any limit.
    """

    def __init__(self, iterator: Iterator[Any], board: StageBoard, workers: int, timeout_s: float) -> None:
        self.stall: str | None = None  # what stands still
        self.processes: tuple[BaseProcess, ...] = tuple(getattr(iterator, "_workers", ()))
        self._board, self._workers, self._timeout_s = board, workers, timeout_s
        self._asked: float | None = time.monotonic()  # None while nothing is waited for
        self._is_over = threading.Event()
        threading.Thread(target=self._look, name="watch-data", daemon=True).start()

    def begin(self) -> None:
        """A batch is waited for from now on."""
        self._asked = time.monotonic()

    def pause(self) -> None:
        """It is there."""
        self._asked = None

    def end(self) -> None:
        """Look no more."""
        self._is_over.set()

    def _look(self) -> None:
        while not self._is_over.wait(min(POLL_S, self._timeout_s / 4)):
            asked = self._asked
            if asked is None or time.monotonic() - asked < self._timeout_s:
                continue
            if _moves(self._board, self._workers, self._timeout_s):
                self._asked = self._asked and time.monotonic()
                continue
            self.stall = _describe_stall(self._board, self._workers, self._timeout_s)
            for process in self.processes:
                process.kill()
            return


def _translate(error: Exception, board: StageBoard, processes: Sequence[BaseProcess]) -> UserError | None:
    """Why there is no batch; None for what a worker raised."""
    workers = len(processes)
    # A bus error is how a process ends that writes to shared memory which was promised and is not there.
    if _TORCH_FILE in str(error) or any(process.exitcode == -signal.SIGBUS for process in processes):
        return _lack_of_shared_memory()
    if isinstance(error, RuntimeError):
        return _death(board, workers, error) if any(words in str(error) for words in _DIED) else None
    if str(error).startswith(_RAISED):
        return None
    return _death(board, workers, error)  # between announcing a batch and handing over the memory that holds it


def _death(board: StageBoard, workers: int, error: Exception) -> UserError:
    doing = "; ".join(f"worker {i}: {board.read(i).describe()}" for i in range(workers))
    return UserError(
        f"a worker of the data loader died, often for want of memory ({' '.join(str(error).split())}); "
        f"at that time {doing}; try fewer data.num_workers"
    )


def _lack_of_shared_memory() -> UserError:
    """What to say when workers cannot hand over batches."""
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
        room = f"{usage.free / 2**20:,.0f} of {usage.total / 2**20:,.0f} MiB free"
    except OSError:  # not there, as on other systems
        room = "unknown"
    return UserError(
        f"{SHARED_MEMORY}, through which the workers of the data loader hand over batches, is full or too small "
        f"({room}); give data.num_workers=0, or make it larger, as by docker run --shm-size=8g"
    )


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start the workers without torch's SIGCHLD handler, which raises in the middle of a step when a worker dies."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if is_main else None
    try:
        iterator = iter(loader)
    except OSError as error:
        if error.errno == errno.ENOSPC:  # for the semaphores of queues
            raise _lack_of_shared_memory() from error
        raise
    if before is not None:  # None: set by something else than Python
        signal.signal(signal.SIGCHLD, before)
    return iterator


def _watch_thread(loader: DataLoader[Any], board: StageBoard, timeout_s: float) -> Iterator[Any]:
    asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
    given: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    # A daemon, so that a thread that hangs does not keep the process alive.
    threading.Thread(target=_serve, args=(loader, asked, given), name="load-data", daemon=True).start()
    try:
        while True:
            asked.put(True)
            kind, value = _wait(given, board, timeout_s)
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        asked.put(False)


def _serve(loader: DataLoader[Any], asked: queue.SimpleQueue[bool], given: queue.SimpleQueue[tuple[str, Any]]) -> None:
    iterator = iter(loader)
    while asked.get():
        try:
            given.put(("batch", next(iterator)))
        except StopIteration:  # noqa: PERF203 - once per batch
            given.put(("end", None))
        except BaseException as error:  # raised where it is waited for
            given.put(("error", error))


def _wait(given: queue.SimpleQueue[tuple[str, Any]], board: StageBoard, timeout_s: float) -> tuple[str, Any]:
    while True:
        try:
            return given.get(timeout=timeout_s)
        except queue.Empty:  # noqa: PERF203 - once per batch
            if not _moves(board, 1, timeout_s):
                raise UserError(_describe_stall(board, 1, timeout_s)) from None


def _moves(board: StageBoard, workers: int, timeout_s: float) -> bool:
    """Whether any worker entered a stage within `timeout_s`; idle ones do not count."""
    now = [board.read(worker) for worker in range(workers)]
    moves = any(each.stage != IDLE and each.seconds < timeout_s for each in now)
    if moves:
        logger.warning("waiting for data: %s", "; ".join(f"worker {i}: {n.describe()}" for i, n in enumerate(now)))
    return moves


def _describe_stall(board: StageBoard, workers: int, timeout_s: float) -> str:
    now = sorted(((board.read(worker), worker) for worker in range(workers)), key=lambda item: -item[0].seconds)
    busy = [item for item in now if item[0].stage != IDLE]
    stuck = "; ".join(f"worker {worker} {each.describe()}" for each, worker in busy or now)
    return (
        f"loading data stands still for {timeout_s:g} s: waiting for {stuck}; look at that disk or "
        "server, or give data.stall_timeout_s more time"
    )
