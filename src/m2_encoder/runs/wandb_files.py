"""Which run at W&B the one in a folder is, and W&B's files there that are no longer to be uploaded."""

from __future__ import annotations

import json
import re
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Final

from m2_encoder.files import write_json

ID_FILE: Final = "wandb.json"
"""In the run's folder: its id at W&B, and of which folder that is."""

_ID: Final = re.compile(r"[\w-]{1,64}", re.ASCII)


def new_id() -> str:
    """An id that no other run has."""
    return uuid.uuid4().hex[:16]


def find_id(folder: Path) -> str | None:
    """The id of the run in a folder; None for a new run, and for a copy of another one's folder.

    A folder that was moved keeps its id: it is the same one for the file system.
    """
    with suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads((folder / ID_FILE).read_bytes())
        is_own = record["folder"] == str(folder.resolve()) or record["inode"] == folder.stat().st_ino
        if is_own and _ID.fullmatch(record["id"]):
            return str(record["id"])
    return None


def keep_id(folder: Path, run_id: str) -> None:
    """Notes the id of the run in a folder."""
    place = {"folder": str(folder.resolve()), "inode": folder.stat().st_ino}
    write_json(folder / ID_FILE, {"id": run_id, **place})


def set_aside(folder: Path, current: Path) -> None:
    """Keeps `wandb sync` from what earlier starts wrote, which is older than what W&B gets now: `*.wandb.replaced`.

    Args:
        folder: the run's.
        current: the folder of W&B's files of this start.
    """
    for path in (folder / "wandb").glob("*run-*/*.wandb"):
        if path.parent.resolve() != current.resolve():
            path.rename(path.with_suffix(".wandb.replaced"))
