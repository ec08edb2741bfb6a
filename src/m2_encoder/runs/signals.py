"""SIGINT, SIGTERM and SIGHUP end a run, whatever it is doing: what does not end by itself is ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

from lightning.pytorch.utilities.exceptions import SIGTERMException

from m2_encoder.distributed.ranks import is_first_rank
from m2_encoder.training.callbacks.checkpoint import RunCheckpoint

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_TERMINATED: Final = {128 + number: number for number in (signal.SIGTERM, signal.SIGHUP)}
_GRACE_S: Final = 5.0  # to end by itself, where no step has to be finished first


@contextlib.contextmanager
def end_on_signals(end_ranks: Callable[[], None]) -> Iterator[None]:
    """While inside, SIGTERM and SIGHUP raise `SystemExit`, as SIGINT raises `KeyboardInterrupt`, and all are seen to.

    SIGHUP comes when a terminal is closed; where it is ignored, as by nohup, it stays so.

    Python runs its handlers between two of its own instructions, so that a process which waits in a collective call, or
    for another rank, hears nothing. A thread hears the same signals: it ends the process after a second SIGINT, and
    some seconds after any signal for which no step is saved (`RunCheckpoint` handles signals while it trains).

    In other threads than the main one, which get no signals, nothing is done.

    Args:
        end_ranks: ends the processes that this one has started.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, wakes = socket.socketpair()
    wakes.setblocking(False)
    listener = threading.Thread(target=_listen, args=(heard, end_ranks), name="signals", daemon=True)
    numbers = [n for n in _TERMINATED.values() if signal.getsignal(n) != signal.SIG_IGN or n != signal.SIGHUP]
    before = {number: signal.signal(number, _terminate) for number in numbers}
    old = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    listener.start()
    try:
        yield
    except SystemExit as end:
        number = _TERMINATED.get(end.code) if isinstance(end.code, int) else None
        if number is not None and not isinstance(end, SIGTERMException) and is_first_rank():
            print(_describe(number), file=sys.stderr)
        raise
    finally:
        signal.set_wakeup_fd(old)
        for each, handler in before.items():
            signal.signal(each, handler)
        wakes.shutdown(socket.SHUT_RDWR)  # which ends the thread, whatever forked process holds a copy of it
        listener.join()
        wakes.close()
        heard.close()


def _terminate(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _listen(heard: socket.socket, end_ranks: Callable[[], None]) -> None:
    first: tuple[int, float] | None = None  # the signal that is to end the process, and until when it may
    interrupts = 0
    while True:
        heard.settimeout(None if first is None else max(0.01, first[1] - time.monotonic()))
        try:
            numbers = heard.recv(64)
        except TimeoutError:
            numbers = b""
        else:
            if not numbers:
                return  # closed: the run is over
        interrupts += numbers.count(signal.SIGINT)
        if interrupts > 1:
            _end(signal.SIGINT, end_ranks)
        for number in numbers:
            if number in _SIGNALS and first is None and not _is_saved(number):
                first = (number, time.monotonic() + _GRACE_S)
        if first is not None and time.monotonic() >= first[1]:
            _end(first[0], end_ranks)


def _is_saved(number: int) -> bool:
    """Whether a checkpoint will be written for this signal."""
    return isinstance(getattr(signal.getsignal(number), "__self__", None), RunCheckpoint)


def _end(number: int, end_ranks: Callable[[], None]) -> None:
    with contextlib.suppress(Exception):
        end_ranks()
    with contextlib.suppress(OSError):
        if is_first_rank():
            os.write(2, f"{_describe(number)}\n".encode())
    os._exit(128 + number)


def _describe(number: int) -> str:
    return f"m2-train: ended by {signal.Signals(number).name}; run.resume=auto goes on from the last checkpoint"
