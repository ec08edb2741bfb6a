"""The folder of a run: whether it may be used, and that one process at a time does."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from m2_encoder.config.known import Known
from m2_encoder.config.model_choice import takes_files
from m2_encoder.config.paths import LAST_CHECKPOINT, RUN_LOCK, anchor, default_run_folder
from m2_encoder.config.problems import refuse_all
from m2_encoder.distributed.ranks import is_first_rank
from m2_encoder.errors import Problem
from m2_encoder.files import Holder, LockedError, find_holder, hold_lock


def check_folders(known: Known) -> Iterator[Problem]:
    """Folders that cannot be written, a run's that is in use, or one that is missing where it has to be there."""
    for key in ("run.folder", "data.folder"):
        if (value := known(key, None)) is not None and (reason := _unusable(anchor(value))):
            yield Problem(key, value, reason, "give a folder that you may write to")
    name, resume = known("run.name"), known("run.resume")
    folder = default_run_folder({"run": {"name": name, "folder": known("run.folder")}})
    if not is_first_rank() or _unusable(folder):
        return  # the first rank decides, before the others start
    if (holder := find_holder(folder / RUN_LOCK)) is not None:
        yield _is_at_work(name, holder)
        return
    if resume == "never" and _holds_run(folder):
        yield _is_there(name, folder)
    if resume == "must" and not (folder / LAST_CHECKPOINT).is_file():
        fix = "give the run.name of a run with a checkpoint, or run.resume=auto to start it if there is none"
        yield Problem("run.resume", resume, f"there is no {folder / LAST_CHECKPOINT}", fix)


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
                refuse_all([_is_at_work(name, error.holder)])
            else:
                if cfg["run"].get("resume") == "never" and _holds_run(folder):
                    refuse_all([_is_there(name, folder)])
                if left is not None and left.host != socket.gethostname():
                    # A lock that is not shared between machines would look the same.
                    said = f"its last start did not end by itself ({left.describe()}); going on, end that if it lives"
                    print(f"run {name}: {said}", file=sys.stderr)
        yield


def _holds_run(folder: Path) -> bool:
    """Whether a folder holds more than the trace of a start that failed before it trained anything."""
    return folder.is_dir() and any(entry.name not in (".hydra", RUN_LOCK) for entry in folder.iterdir())


def _is_there(name: str, folder: Path) -> Problem:
    fix = f"continue it with run.resume=auto, give another run.name, or delete {folder}"
    return Problem("run.name", name, f"{folder} holds a run already", fix)


def _is_at_work(name: str, holder: Holder | None) -> Problem:
    who = "" if holder is None else f" ({holder.describe()})"
    fix = "wait until it has ended, end it, or give another run.name"
    return Problem("run.name", name, f"a run of this name is at work{who}", fix)


def _unusable(folder: Path) -> str | None:
    """Why a folder cannot be made or written, or None."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        return f"{existing} is not a folder"
    if not takes_files(existing):
        return f"{existing} may not be written"
    return None
