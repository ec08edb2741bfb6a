"""The folder of the unpacked built-in set: which settings it is of, whether it is whole, and how it appears.

`emoji.json` in it holds the settings that decide its content, their fingerprint, and the SHA-256 of every other file.
A folder never changes its settings: others are refused. Only what is damaged is written again, file by file, and only
in a folder whose name holds the settings; so whoever reads it finds what it was made for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from m2_encoder.errors import UserError
from m2_encoder.files import describe_changes, file_sha256

Split: TypeAlias = Literal["train", "val", "val_style", "heldout_style", "heldout_families"]
EMOJI_SPLITS = get_args(Split)
"""Folders of the unpacked set; see the table in `data.emoji.dataset`."""

EMOJI_MARKER = "emoji.json"
"""File that marks a completely unpacked folder."""

SETTINGS = ("heldout_style", "styles", "samples_per_shard")
"""What decides the content, beside the package; by these names in `EMOJI_MARKER`."""

_STALE_PARTIAL_S = 3600.0  # an unpack takes seconds; an older partial folder belongs to a process that died

logger = logging.getLogger(__name__)


def digest_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every tar and `index.json` of the splits, by name such as "train/000000.tar".

    Raises:
        OSError: if a file cannot be read.
    """
    found = (
        path for split in EMOJI_SPLITS for pattern in ("*.tar", "index.json") for path in (folder / split).glob(pattern)
    )
    return {f"{path.parent.name}/{path.name}": file_sha256(path) for path in found if path.is_file()}


def read_digests(folder: Path) -> Mapping[str, str] | None:
    """What `digest_files` was when the folder was made; None for none, or one of an earlier version."""
    digests = (_read_marker(folder) or {}).get("sha256")
    return digests if isinstance(digests, dict) else None


def check_content(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder with other files, or with the set of other settings; a missing, empty or damaged one is fine.

    Args:
        folder: of which at most `EMOJI_MARKER` is read.
        settings: those of `SETTINGS`, and their `fingerprint`.

    Raises:
        UserError: with the key "folder".
    """

    def refuse(rule: str) -> UserError:
        return UserError(rule, key="folder", value=str(folder))

    if not folder.is_dir():
        if folder.exists():
            raise refuse("is not a folder; give an empty or new folder")
        return
    if foreign := sorted({entry.name for entry in folder.iterdir()} - {EMOJI_MARKER, *EMOJI_SPLITS}):
        raise refuse(f"holds other files ({', '.join(foreign[:5])}); give an empty or new folder")
    marker = _read_marker(folder)
    if marker is None or marker["fingerprint"] == settings["fingerprint"]:
        return
    differ = [name for name in SETTINGS if marker.get(name) != settings[name]]
    there, wanted = (", ".join(f"{name}={_show(each.get(name))}" for name in differ) for each in (marker, settings))
    what = (
        f"the built-in set with {there}, and {wanted} is asked for"
        if differ
        else "the set of another version of this package"
    )
    raise refuse(f"holds {what}; give another folder, or null: a folder for each setting")


def publish(partial: Path, folder: Path, *, is_named: bool) -> None:
    """Make `partial`, which is whole, appear as `folder`, unless another process, such as a rank, was faster.

    Args:
        partial: removed by whoever made it.
        folder: passed `check_content`.
        is_named: whether its name holds the settings: what is damaged in it is then replaced.

    Raises:
        UserError: for a damaged folder of another name, or files that do not belong there.
        OSError: if the disk refuses.
    """
    try:
        partial.rename(folder)  # onto an empty one, too
        return
    except OSError:
        if not folder.is_dir():
            raise
    marker = json.loads((partial / EMOJI_MARKER).read_bytes())
    check_content(folder, marker)
    made, now = marker["sha256"], digest_files(folder)
    if changes := describe_changes(made, now):
        if not is_named or now.keys() - made.keys():
            rule = f"{changes}; remove the folder to have it made anew, or give another one"
            raise UserError(rule, key="folder", value=str(folder))
        logger.warning("%s: %s: made anew", folder, changes)
    for name in (name for name in made if now.get(name) != made[name]):
        (folder / name).parent.mkdir(exist_ok=True)
        os.replace(partial / name, folder / name)
    if read_digests(folder) != made:
        with contextlib.suppress(OSError):  # an earlier version's, on a read-only disk
            os.replace(partial / EMOJI_MARKER, folder / EMOJI_MARKER)


@contextlib.contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, on the same disk; removes those that dead processes left.

    Where `folder` is there and nothing can be written beside it, the temporary one is good for comparing alone.
    """
    prefix = f".{folder.name}.partial-"
    folder.parent.mkdir(parents=True, exist_ok=True)
    for path in folder.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.name.startswith(prefix) and time.time() - path.stat().st_mtime > _STALE_PARTIAL_S:
                shutil.rmtree(path, ignore_errors=True)
    beside = folder.parent if os.access(folder.parent, os.W_OK) or not folder.exists() else None
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=beside))
    try:
        partial.chmod(0o755)  # mkdtemp makes folders private; shared data is not
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_marker(folder: Path) -> dict[str, Any] | None:
    """None if it is absent, damaged or of another program."""
    try:
        marker = json.loads((folder / EMOJI_MARKER).read_bytes())
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and isinstance(marker.get("fingerprint"), str) else None


def _show(value: object) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)
