"""Standard output and error that never end a command: closed ones swallow, other encodings than UTF-8 escape."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final, TextIO

from m2_encoder.errors import MAX_LINE, abridge_list

_PACKAGE: Final = "m2_encoder"
_MAX_LOGGED: Final = MAX_LINE - 100  # a time and the name of a logger come before it


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """While inside, nothing that is printed raises.

    Where the reader has gone (`| head`), the terminal was closed, or the disk under a log is full, text is dropped. A
    character that the encoding lacks is written as its escape. Streams that are not files stay as they are. Lines that
    this package logs are as `say` prints them.
    """
    before, make_record = (sys.stdout, sys.stderr), logging.getLogRecordFactory()
    logging.setLogRecordFactory(partial(_abridged_record, make_record))
    sys.stdout, sys.stderr = _lasting(sys.stdout, 1), _lasting(sys.stderr, 2)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make_record)
        for now, old, name in zip((sys.stdout, sys.stderr), before, ("stdout", "stderr"), strict=True):
            if now is not old:
                now.flush()
                setattr(sys, name, old)


def say(*lines: str, error: bool = False) -> None:
    """Print what `errors.abridge_list` makes of lines, on standard error or output; they may hold names of users."""
    print(*abridge_list(lines), sep="\n", file=sys.stderr if error else sys.stdout, flush=True)


def _abridged_record(make: Callable[..., logging.LogRecord], *args: Any, **kwargs: Any) -> logging.LogRecord:
    record = make(*args, **kwargs)
    if record.name.startswith(_PACKAGE):
        lines = record.getMessage().splitlines()
        record.msg, record.args = "\n".join(abridge_list(lines, _MAX_LOGGED)), ()
    return record


class _LastingFile(io.FileIO):
    """A file descriptor whose failures to write are not told."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)  # type: ignore[return-value,unused-ignore]
        except OSError:
            return memoryview(data).nbytes


def _lasting(stream: TextIO | None, descriptor: int) -> TextIO:
    if stream is None:  # closed before Python started, so that the next file to be opened would take its place
        null = os.open(os.devnull, os.O_WRONLY)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)
        return open(descriptor, "w", encoding="utf-8", closefd=False)
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    if not isinstance(getattr(stream.buffer, "raw", stream.buffer), io.FileIO):  # itself where Python does not buffer
        return stream
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
    try:
        raw = _LastingFile(stream.fileno(), "w", closefd=False)
    except (OSError, ValueError):
        return stream
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering or raw.isatty(),
        write_through=stream.write_through,
    )
