"""A job of a sweep as a process of its own.

What one job does to its process, or what is done to it (a crash in a library, the kernel that wants its memory), does
not reach the others, and a job may start ranks, which would otherwise start the sweep again.
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Final, NamedTuple

_LINES_KEPT: Final = 20
_OF_HYDRA: Final = "Set the environment variable HYDRA_FULL_ERROR"  # below every traceback


class Ended(NamedTuple):
    """How a process ended."""

    code: int  # as a shell says it: 128 + the number of a signal
    said: str  # the last line on stderr that says something of it, or nothing


def run_process(
    module: str, arguments: Sequence[str], *, environment: Mapping[str, str] | None = None, log: Path | None = None
) -> Ended:
    """Runs `python -m module arguments` to its end; what it says on stderr is passed on as it comes.

    SIGTERM is passed on, too, so that the job can save, and sent after Ctrl-C, which may have come to this process
    alone; the job's end is waited for.

    Args:
        module: with a `__main__`.
        arguments: of its command line.
        environment: more variables.
        log: a file that gets all output instead, behind what it has.

    Raises:
        SystemExit: with 143, after SIGTERM.
        KeyboardInterrupt: after Ctrl-C.
    """
    with contextlib.ExitStack() as stack:
        output = None if log is None else stack.enter_context(open(log, "ab"))
        command = [sys.executable, "-m", module, *arguments]
        more = {**os.environ, **(environment or {})}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, env=more)
        last: collections.deque[str] = collections.deque(maxlen=_LINES_KEPT)
        assert process.stderr is not None
        reader = threading.Thread(target=_pass_on, args=(process.stderr, last, log), daemon=True)
        reader.start()
        with _passing_on_sigterm(process) as terminated:
            try:
                process.wait()
            except KeyboardInterrupt:
                process.terminate()
                process.wait()
                raise
        reader.join(timeout=5)  # a process that it left behind may hold the pipe
    if terminated:
        raise SystemExit(128 + signal.SIGTERM)
    code = process.returncode if process.returncode >= 0 else 128 - process.returncode
    telling = (line.strip() for line in reversed(last) if not line.startswith(_OF_HYDRA))
    return Ended(code, next(filter(None, telling), ""))


def _pass_on(stream: IO[bytes], last: collections.deque[str], log: Path | None) -> None:
    with stream, contextlib.nullcontext(sys.stderr) if log is None else open(log, "a", encoding="utf-8") as output:
        for line in stream:
            text = line.decode("utf-8", "replace")
            output.write(text)
            output.flush()
            last.append(text)


@contextlib.contextmanager
def _passing_on_sigterm(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """While inside, SIGTERM goes to a process; gives the list that it is noted in."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # a launcher's thread: signals are not for it
        yield noted
        return

    def pass_on(number: int, _frame: FrameType | None) -> None:
        noted.append(number)
        process.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)
