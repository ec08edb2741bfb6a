"""One process at a time runs a sweep, and its jobs end with it, however it ends.

The process that runs a sweep holds a lock in its folder, and its jobs look after that lock: the kernel frees it when
the process is killed, too, and a launcher's processes between the two need not know.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from m2_encoder.config.output import say
from m2_encoder.config.paths import RUN_LOCK
from m2_encoder.errors import UserError
from m2_encoder.files import Holder, LockedError, find_holder, hold_lock

_VARIABLE: Final = "M2_ENCODER_SWEEP"
"""For the processes of a sweep: the number of its first process, of the one that started this one, and its folder."""

_WATCH: Final = "sweep"  # name of a thread
_ATTEMPTS: Final = 5
_LOOKS_S: Final = 1.0
_PATIENCE_S: Final = 90.0  # for what was started by an earlier process of this sweep, and saves its step


@contextlib.contextmanager
def hold_sweep(folder: Path) -> Iterator[None]:
    """Keeps other processes from running the same sweep; the processes of its jobs end with this one.

    Raises:
        UserError: if another process runs it.
    """
    before = os.environ.get(_VARIABLE)
    with contextlib.ExitStack() as stack:
        for attempt in reversed(range(_ATTEMPTS)):
            try:
                stack.enter_context(hold_lock(folder / RUN_LOCK))
                break
            except LockedError as error:
                if not attempt:
                    raise _is_at_work(folder, error.holder) from error
                time.sleep(0.1)  # a job that looks whether the lock is held holds it for a moment
        os.environ[_VARIABLE] = f"{os.getpid()} {os.getpid()} {folder}"
        try:
            yield
        finally:
            os.environ.pop(_VARIABLE)
            os.environ.update({} if before is None else {_VARIABLE: before})


def refuse_second(folder: Path) -> None:
    """Refuses, before anything is checked, a sweep that another process runs.

    Raises:
        UserError: if one does.
    """
    if (holder := find_holder(folder / RUN_LOCK)) is not None:
        raise _is_at_work(folder, holder)


def await_run(run: Path) -> None:
    """Waits, not for long, for the end of a run that an earlier start of this sweep has left."""
    end = time.monotonic() + _PATIENCE_S
    said = False
    while time.monotonic() < end and (holder := find_holder(run / RUN_LOCK)) is not None:
        if not said:
            say(f"waiting for run {run.name}, which an earlier start has left ({holder.describe()})", error=True)
            said = True
        time.sleep(0.2)


def _is_at_work(folder: Path, holder: Holder | None) -> UserError:
    who = "" if holder is None else f" ({holder.describe()})"
    return UserError(f"{folder}: this sweep is at work{who}; wait until it has ended, end it, or give another run.name")


def environment_of_job() -> dict[str, str]:
    """What a process that this one starts for a job needs to know to end with the sweep; nothing outside of one."""
    first, _, folder = _given(os.environ.get(_VARIABLE))
    return {_VARIABLE: f"{first} {os.getpid()} {folder}"} if folder else {}


def leave_with_sweep() -> None:
    """Ends this process if it works for a sweep, as a launcher's process, whose first process is gone: now or later."""
    given = os.environ.get(_VARIABLE)
    if not _lives(given):
        os._exit(128 + signal.SIGTERM)
    if _given(given)[0] in (0, os.getpid()) or any(each.name == _WATCH for each in threading.enumerate()):
        return

    def watch() -> None:
        while _lives(given):
            time.sleep(_LOOKS_S)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name=_WATCH, daemon=True).start()


def end_with_sweep() -> None:
    """From now on, SIGTERM comes to this process when its sweep, or the process that has started it, is gone.

    What it starts itself is its own affair.
    """
    given = os.environ.pop(_VARIABLE, None)
    _, starter, folder = _given(given)
    if not folder:
        return

    def watch() -> None:
        while os.getppid() == starter and _lives(given):
            time.sleep(_LOOKS_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name=_WATCH, daemon=True).start()


def _lives(given: str | None) -> bool:
    first, _, folder = _given(given)
    if not folder or first == os.getpid():
        return True
    holder = find_holder(Path(folder) / RUN_LOCK)
    return holder is not None and holder.pid == first


def _given(text: str | None) -> tuple[int, int, str]:
    parts = (text or "").split(" ", 2)
    return (int(parts[0]), int(parts[1]), parts[2]) if len(parts) == 3 else (0, 0, "")
