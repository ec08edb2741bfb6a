"""The output folder of a curation: its files, its lock, and whether it is finished."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from m2_encoder.data.shards.index import INDEX_SUFFIX
from m2_encoder.errors import UserError

MARKER: Final = "curation.json"
REPORT: Final = "report.json"
_KEPT: Final = "kept"  # in WORK
WORK: Final = ".work"
DECISIONS: Final = "decisions"


class OutputFolder:
    """The output folder of one set of settings and shards; `fingerprint` hashes all that decides the result."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path.absolute()
        self.fingerprint = fingerprint

    def open(self, *, write: bool, overwrite: bool) -> dict[str, Any] | None:
        """Make the folder, or take over what an earlier run left.

        Returns:
            The report if the same curation is finished already, else None. A finished decision without written shards
                counts only for `write=False`.

        Raises:
            UserError: if the folder holds other files, or another finished curation and `overwrite` is False.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output {self.path}: cannot be made ({error.strerror}); give another folder") from error
        marker = self.path / MARKER
        if not marker.is_file():
            foreign = sorted(entry.name for entry in self.path.iterdir())
            if foreign:
                raise UserError(
                    f"output {self.path}: holds other files ({', '.join(foreign[:5])}); give an empty or new folder"
                )
            marker.write_text('{"made_by": "m2-data curate"}\n', encoding="ascii")
        report = self.path / REPORT
        if report.is_file():
            finished = _read_report(report)
            is_same = finished["fingerprint"] == self.fingerprint
            if is_same and (finished["written"] or not write):
                return finished
            if finished["written"] and not overwrite:
                raise UserError(
                    f"output {self.path}: holds a finished curation of other shards or settings; give another folder, "
                    "or replace it with overwrite=true"
                )
            report.unlink()
        return None

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out; the lock ends with the process, however that ends.

        Raises:
            UserError: if another process is at work.
        """
        (self.path / WORK).mkdir(exist_ok=True)
        with (self.path / WORK / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(
                    f"output {self.path}: another process curates into it; wait, or give another"
                ) from error
            for path in self.path.rglob(".*.tmp"):  # of writers that were killed; `files.atomic_file` names them
                path.unlink(missing_ok=True)
            yield

    def stage(self, name: str, key: str) -> Path:
        """Where the files of a stage are."""
        return self.path / WORK / f"{name}-{key}"

    def keep_only(self, tars: Sequence[str], markers: Sequence[Path]) -> None:
        """Remove the shards whose marker is missing, such as those of an interrupted run with other settings."""
        # Markers of other settings name the same shards: they go before any shard changes.
        for folder in (self.path / WORK).glob("write-*"):
            if folder not in {marker.parent for marker in markers}:
                shutil.rmtree(folder)
        vouched = {self.path / tar for tar, marker in zip(tars, markers, strict=True) if marker.exists()}
        for path in self.path.glob("*/[0-9][0-9][0-9][0-9][0-9][0-9].tar"):
            if path not in vouched:
                path.unlink()
                path.with_name(f"{path.name}{INDEX_SUFFIX}").unlink(missing_ok=True)
        for tar, marker in zip(tars, markers, strict=True):
            if not (self.path / tar).exists():
                marker.unlink(missing_ok=True)
        shutil.rmtree(self.path / DECISIONS, ignore_errors=True)
        for folder in self.path.iterdir():
            if folder.is_dir() and folder.name != WORK and not any(folder.iterdir()):
                folder.rmdir()

    def publish(self, decided: Path) -> None:
        """Link or copy the decided table of a shard into `decisions/`."""
        (self.path / DECISIONS).mkdir(exist_ok=True)
        target = self.path / DECISIONS / decided.name
        target.unlink(missing_ok=True)
        try:
            os.link(decided, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(decided, target)

    def keep_work(self) -> None:
        """Say that the intermediate files are to stay."""
        (self.path / WORK / _KEPT).touch()

    def is_untidy(self) -> bool:
        """Whether intermediate files are left that were not to be kept, such as by a run killed at its very end."""
        return (self.path / WORK).is_dir() and not (self.path / WORK / _KEPT).exists()

    def remove_work(self) -> None:
        """Remove all intermediate files."""
        shutil.rmtree(self.path / WORK, ignore_errors=True)


def _read_report(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and {"fingerprint", "written", "total", "sources"} <= set(found):
            return found
    except ValueError:
        pass
    raise UserError(f"{path}: is damaged; remove it and start again: what is finished beside it is then made anew")
