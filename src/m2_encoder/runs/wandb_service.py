"""W&B's own process, which may hang or be stopped: whatever waits for it does so within a limit."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_SERVICE: Final = "wandb-core"


@contextmanager
def bounded_service(limit_s: float) -> Iterator[threading.Event]:
    """Ends W&B's own process if an action takes longer, because one that is stopped would keep the run for ever.

    The event that it yields says that this has happened.
    """
    ended = threading.Event()

    def end() -> None:
        for pid in find_services():
            ended.set()
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield ended
    finally:
        timer.cancel()


def find_services() -> list[int]:
    """Process ids of W&B's service, where this process has started one; empty where there is no /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError):
            pid, _, rest = path.read_text(encoding="utf-8", errors="replace").partition(" (")
            name, _, fields = rest.rpartition(") ")
            if name.startswith(_SERVICE) and int(fields.split()[1]) == os.getpid():
                found.append(int(pid))
    return found
