"""Results of a long benchmark, kept setting by setting."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """Settings that are measured already, so that an interrupted run can go on.

    Args:
        path: file that is written anew after every setting; None keeps nothing.
        identity: what was measured how; a journal of another measurement counts as empty.

    Attributes:
        found: what was measured, by setting.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self._path, self._identity = path, dict(identity)
        self.found: dict[str, Any] = {}
        if path is not None and path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["identity"] == self._identity:
                self.found = content["found"]

    def add(self, setting: str, entry: Mapping[str, Any]) -> None:
        """Keep one setting."""
        self.found[setting] = dict(entry)
        if self._path is not None:
            unfinished = self._path.with_name(f"{self._path.name}.new")
            unfinished.write_text(json.dumps({"identity": self._identity, "found": self.found}), encoding="utf-8")
            os.replace(unfinished, self._path)  # whoever ends the run now leaves one or the other, never a half

    def remove(self) -> None:
        """The report is written; the journal has served."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
