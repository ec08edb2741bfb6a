"""Notices that an index was written anew, so that new pictures are found without a restart."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from m2_encoder.errors import UserError
from m2_encoder.picture_search.index import INDEX_FILE, PictureIndex, open_index

_PAUSE_S: Final = 1.0

logger = logging.getLogger(__name__)


class IndexWatch:
    """Looks at most once a second whether the file of an index is another one.

    Args:
        index: as it is open.
        use: gets the new one. What is at work with the old one goes on with it: its files stay readable.
    """

    def __init__(self, index: PictureIndex, use: Callable[[PictureIndex], object]) -> None:
        self._index = index
        self._use = use
        self._seen = self._state()
        self._next = 0.0

    async def look(self) -> None:
        """Opens the index anew if it has changed; the log names one that cannot be used, and the old one stays."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _PAUSE_S
        state = await asyncio.to_thread(self._state)
        if state is None or state == self._seen:
            return
        self._seen = state
        try:
            index = await asyncio.to_thread(open_index, self._index.path)
        except UserError as error:
            logger.warning("the index as it was before is served: %s", error)
            return
        if index.made_by.fingerprint != self._index.made_by.fingerprint:
            logger.warning("%s is of another model now: start m2-serve again", index.path)
            return
        self._index = index
        self._use(index)

    def _state(self) -> tuple[int, int] | None:
        """What tells two files apart; None while there is none."""
        try:
            status = (self._index.path / INDEX_FILE).stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns
