"""The folder of a run: one process at a time uses it. Light to import, as every command does it."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from m2_encoder.config.output import say
from m2_encoder.config.paths import RUN_LOCK, default_run_folder, is_debug
from m2_encoder.config.problems import refuse_all
from m2_encoder.distributed.ranks import is_first_rank
from m2_encoder.errors import Problem
from m2_encoder.files import Holder, LockedError, hold_lock


@contextmanager
def hold_run(cfg: Mapping[str, Any]) -> Iterator[None]:
    """Keeps other processes out of a run's folder, which is made; the first rank does it for all.

    Raises:
        UserError: if another process trains there, or has done so since the configuration was checked.
    """
    with ExitStack() as stack:
        if is_first_rank():
            name, folder = cfg["run"]["name"], default_run_folder(cfg)
            try:
                left = stack.enter_context(hold_lock(folder / RUN_LOCK))
            except LockedError as error:
                refuse_all([is_at_work(name, error.holder)])
            else:
                if cfg["run"].get("resume") == "never" and not is_debug(cfg) and holds_run(folder):
                    refuse_all([is_there(name, folder)])
                if left is not None and left.host != socket.gethostname():
                    # A lock that is not shared between machines would look the same.
                    said = f"its last start did not end by itself ({left.describe()}); going on, end that if it lives"
                    say(f"run {name}: {said}", error=True)
        yield


def holds_run(folder: Path) -> bool:
    """Whether a folder holds more than the trace of a start that failed before it trained anything."""
    return folder.is_dir() and any(entry.name not in (".hydra", RUN_LOCK) for entry in folder.iterdir())


def is_there(name: str, folder: Path) -> Problem:
    """That a folder holds a run which has ended."""
    fix = f"continue it with run.resume=auto, give another run.name, or delete {folder}"
    return Problem("run.name", name, f"{folder} holds a run already", fix)


def is_at_work(name: str, holder: Holder | None) -> Problem:
    """That a folder is that of a run which lives."""
    who = "" if holder is None else f" ({holder.describe()})"
    fix = "wait until it has ended, end it, or give another run.name"
    return Problem("run.name", name, f"a run of this name is at work{who}", fix)
