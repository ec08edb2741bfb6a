"""Which checkpoints of a run stay."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class KeptCheckpoints:
    """The newest checkpoints stay, and the first of every so many steps; older ones are deleted.

    Only what this run has written under the same settings is ever deleted: the steps are part of the state that is
    saved, so that files of an earlier start with other settings, and those that nobody knows of, are left alone.

    Args:
        folder: of the checkpoints.
        last: how many of the newest stay; None keeps all.
        every: of the checkpoints in each span of so many steps, the first stays, too; None keeps none of them.
    """

    def __init__(self, folder: Path, *, last: int | None, every: int | None) -> None:
        self._folder = folder
        self._last, self._every = last, every
        self._recent: list[int] = []  # steps that may be deleted once newer ones are there, and how many of them stay
        self._lasting: list[int] = []  # steps among them that stay for good
        self._span = 0  # the last one of `every` steps from which a checkpoint stays

    def begin(self, step: int) -> None:
        """Count a checkpoint that is about to be written."""
        if step in self._recent:  # written again
            return
        self._recent.append(step)
        if self._every is not None and step // self._every > self._span:
            self._span = step // self._every
            self._lasting.append(step)

    def prune(self) -> list[Path]:
        """Give up what is one too many, now that the newest one is whole; the files to delete."""
        given_up = []
        while self._last is not None and len(self._recent) > self._last:
            step = self._recent.pop(0)
            if step in self._lasting:
                self._lasting.remove(step)
            else:
                given_up.append(self.path(step))
        return given_up

    def path(self, step: int) -> Path:
        """The file of a step."""
        return self._folder / f"step={step}.ckpt"

    def state_dict(self) -> dict[str, Any]:
        """The settings, and what is known of the files."""
        if self._last is None:
            return {"last": None, "every": self._every}
        own = {"recent": list(self._recent), "lasting": list(self._lasting), "span": self._span}
        return {"last": self._last, "every": self._every, **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the files of an earlier start, if its settings were these."""
        if self._last is not None and (state.get("last"), state.get("every")) == (self._last, self._every):
            self._recent, self._lasting = list(state["recent"]), list(state["lasting"])
            self._span = int(state["span"])

    def begin_at(self, step: int) -> None:
        """Say which files of earlier starts stay whatever the settings; called once, where a run goes on."""
        if self._last is None:
            return
        if self._every is not None:
            self._span = max(self._span, step // self._every)
        known = {*self._recent, *self._lasting}
        matches = (re.fullmatch(r"step=(\d+)\.ckpt", path.name) for path in self._folder.glob("step=*.ckpt"))
        others = sorted({int(match[1]) for match in matches if match} - known)
        if others and not known:
            logger.warning(
                "run.keep_last=%d counts from step %d on; %d checkpoints of before stay: step=%d.ckpt%s",
                *(self._last, step, len(others), others[0]),
                f" to step={others[-1]}.ckpt" if len(others) > 1 else "",
            )


def delete(path: Path) -> None:
    """Delete a checkpoint, if that is possible: the training is worth more than the room."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be deleted (%s); delete it by hand", path, error.strerror)
