"""Processes that hold locks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from m2_encoder.files import hold_lock


@contextmanager
def held_elsewhere(path: Path) -> Iterator[int]:
    """A process that holds a lock until it is killed; gives its id."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            with hold_lock(path):
                os.write(write, b"x")
                time.sleep(60)
        finally:
            os._exit(1)
    try:
        assert os.read(read, 1) == b"x"
        yield pid
    finally:
        os.close(read)
        os.close(write)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
