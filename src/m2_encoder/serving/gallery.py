"""Pictures of the indexed folder: the files themselves, and small copies of them.

A file is served if the index names it, it lies below the folder with all links followed, and its content is a picture.
"""

from __future__ import annotations

import asyncio
import os
import stat
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

from m2_encoder.data.images.opening import FORMATS, name_format, read_picture_file
from m2_encoder.errors import ImageError
from m2_encoder.picture_search.index import PictureIndex, find_file
from m2_encoder.picture_search.thumbnails import make_thumbnail
from m2_encoder.serving.refusals import Refusal, busy, invalid

SIZES: Final = (320, 1600)
"""Longest sides of copies in pixels: of a list, and of a screen."""

_CACHE_BYTES: Final = 64 * 2**20
_MAX_WAITING: Final = 512
_THREADS: Final = 2
_HEAD_BYTES: Final = 1024  # tell a format
_MEDIA_TYPES: Final = {"HEIF": "image/heic"}


class PictureFile(NamedTuple):
    """A file that may be served."""

    path: Path
    media_type: str
    size: int  # bytes
    tag: str  # changes with the content


class Gallery:
    """The files of an index.

    Args:
        index: may be replaced by a newer one with `use`.
    """

    def __init__(self, index: PictureIndex) -> None:
        self._index = index
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="thumbnail")
        self._cache: OrderedDict[tuple[str, int], tuple[str, bytes]] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()
        self._waiting = 0

    def use(self, index: PictureIndex) -> None:
        """Takes a newer index from now on."""
        self._index = index

    def find(self, name: str) -> PictureFile:
        """The file of a name.

        Raises:
            Refusal: 404, if the index does not name it, it is gone, or it lies elsewhere; 415 if it is no picture.
        """
        index = self._index
        row_of(index, name)
        try:
            path = find_file(index.root, name)
            if path is None:
                raise Refusal(404, "elsewhere", f"{name} is a link to a file outside of the indexed folder")
            with open(path, "rb", opener=_open_now) as file:
                status = os.fstat(file.fileno())
                head = file.read(_HEAD_BYTES) if stat.S_ISREG(status.st_mode) else b""
        except (OSError, ValueError) as error:  # of a name with a NUL
            raise Refusal(404, "gone", f"{name} is not there any more: index the folder again") from error
        if (kind := name_format(head)) not in FORMATS:
            raise Refusal(415, "no_picture", f"{name} is no picture any more: index the folder again")
        media_type = _MEDIA_TYPES.get(kind, f"image/{kind.lower()}")
        return PictureFile(path, media_type, status.st_size, f'"{status.st_mtime_ns:x}-{status.st_size:x}"')

    async def thumbnail(self, name: str, size: int) -> tuple[str, bytes]:
        """The tag of a picture, and a JPEG of it whose longer side has at most `size` pixels, one of `SIZES`.

        Raises:
            Refusal: as `find`; 415 for a damaged picture, 503 if too many wait.
        """
        if size not in SIZES:
            raise invalid(f"size={size}: choose one of {', '.join(map(str, SIZES))}")
        if self._waiting >= _MAX_WAITING:
            raise busy(f"{self._waiting} thumbnails wait")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._thumbnail, name, size)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(cancel_futures=True)

    def _thumbnail(self, name: str, size: int) -> tuple[str, bytes]:
        file = self.find(name)
        found = self._cache.get((name, size))
        if found is not None and found[0] == file.tag:
            return found
        try:
            made = file.tag, make_thumbnail(read_picture_file(file.path), size)
        except ImageError as error:
            raise Refusal(415, "no_picture", f"{name} cannot be shown: {error.text}") from error
        if size == min(SIZES):  # large ones are looked at once
            self._keep((name, size), made)
        return made

    def _keep(self, key: tuple[str, int], made: tuple[str, bytes]) -> None:
        """Keeps the thumbnails that were made last."""
        with self._lock:
            before = self._cache.pop(key, None)
            self._cache[key] = made
            self._cached_bytes += len(made[1]) - (0 if before is None else len(before[1]))
            while self._cached_bytes > _CACHE_BYTES and len(self._cache) > 1:
                self._cached_bytes -= len(self._cache.popitem(last=False)[1][1])


def row_of(index: PictureIndex, name: str) -> int:
    """The row of a file in an index.

    Raises:
        Refusal: 404, if it has none.
    """
    if (row := index.rows.get(name)) is None:
        raise Refusal(404, "no_picture_of_this_name", f"the index has no picture {name}")
    return row


def _open_now(path: str, flags: int) -> int:
    """Opens a file without waiting, as a pipe would have one do that nobody writes to."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
