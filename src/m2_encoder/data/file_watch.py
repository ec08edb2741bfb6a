"""Whether files that a run measures itself by are still those of its start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress

from m2_encoder.data.retrieval_source import list_tars
from m2_encoder.data.shards.names import walk_files
from m2_encoder.errors import UserError
from m2_encoder.files import describe_changes


class FileWatch:
    """The files of validation sets, by size and time of writing, as they are when it is made.

    Args:
        sources: what `read_samples` reads, by name of the set; what a table names is not watched.
    """

    def __init__(self, sources: Mapping[str, str]) -> None:
        self._before = {name: (source, _stamp(source)) for name, source in sources.items()}

    def check(self) -> None:
        """Check that nothing was written since.

        Raises:
            UserError: naming the set and a file.
        """
        for name, (source, stamps) in self._before.items():
            refuse_changed(f"data.validation.{name}", source, describe_changes(stamps, _stamp(source)))


def refuse_changed(key: str, source: str, changes: str | None) -> None:
    """Refuse to report numbers of what changed under a run; `changes` as `describe_changes` says it.

    Raises:
        UserError: unless there are none.
    """
    if changes is not None:
        rule = f"while the run went on, {changes}: nothing is reported, and the checkpoints stay"
        fix = "restore the files and report with run.resume=auto, or train again if other data may have been read"
        raise UserError(f"{rule}; {fix}", key=key, value=source)


def _stamp(source: str) -> dict[str, tuple[int, int]]:
    """Size in bytes and time of writing in ns of the tars of a source, or of all files of one to pack, by name."""
    files = list_tars(source)
    if not files:
        files = [os.path.join(folder, name) for folder, names in walk_files(source) for name in names] or [source]
    stamps = {}
    for file in files:
        with suppress(FileNotFoundError):
            status = os.stat(file)
            stamps[os.path.relpath(file, source) if file != source else file] = (status.st_size, status.st_mtime_ns)
    return stamps
