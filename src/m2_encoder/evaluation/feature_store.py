"""Features on disk, by the content that they are of: what was encoded once is not encoded again.

A store is a folder of append-only files, one for each process that writes at a time. A file is a header and records of
one size, (32 bytes of key, E float32, CRC-32 of both), so that whatever a killed process left is whole records and
perhaps a piece of one, which is cut off when the file is opened the next time. A process holds a lock of the kernel on
the file that it writes; the lock ends with the process.

Letters: n keys · E feature dim.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from m2_encoder.errors import UserError
from m2_encoder.files import is_full

SUFFIX: Final = ".features"
KEY_BYTES: Final = 32

_MAGIC: Final = b"m2feat01"
_HEADER: Final = struct.Struct("<8sI")  # magic, E
_CRC: Final = struct.Struct("<I")
_READ_RECORDS: Final = 4096  # at a time, to list their keys


def picture_key(content: bytes) -> bytes:
    """Of a picture's file."""
    return hashlib.sha256(content).digest()


def text_key(text: str) -> bytes:
    """Of a text; lone surrogates count as they are."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


class FeatureStore:
    """One model's features of one kind.

    Args:
        root: of all models' features; missing folders are made.
        fingerprint: of the model.
        kind: what the features are of; `classes` are vectors of classes, by a digest of what made them.
        width: E.

    Raises:
        UserError: if the folder cannot be written, or holds a file that no store wrote.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        fingerprint: str,
        kind: Literal["pictures", "texts", "classes"],
        *,
        width: int,
    ) -> None:
        self.folder = Path(root) / fingerprint / kind
        self.width = width
        self._record = KEY_BYTES + 4 * width + _CRC.size
        self._places: dict[bytes, tuple[int, int]] = {}  # by key: number of the file, offset
        self._files: list[int] = []  # open files, read until the store is closed
        self._writing: int | None = None  # of `_files`, which is locked
        self._path = self.folder
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(self.folder.glob(f"*{SUFFIX}")):
                self._open(path)
        except OSError as error:
            self.close()
            raise _refusal(self.folder, error) from error
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        """Keys that have a feature."""
        return len(self._places)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def get(self, key: bytes) -> Tensor | None:
        """The feature of a key, (E,) fp32; None if there is none."""
        place = self._places.get(key)
        if place is None:
            return None
        number, offset = place
        content = os.pread(self._files[number], 4 * self.width, offset + KEY_BYTES)
        return torch.from_numpy(np.frombuffer(content, dtype="<f4").astype(np.float32))

    def add(self, keys: Sequence[bytes], features: Tensor) -> None:
        """Appends features, (n, E); keys that are there already are passed over.

        Raises:
            UserError: if the disk does not take them; all that was there stays.
        """
        rows = features.detach().float().cpu().contiguous().numpy().astype("<f4", copy=False)
        if rows.shape != (len(keys), self.width):
            raise ValueError(f"features have shape {rows.shape}, expected {(len(keys), self.width)}")
        new = {key: row for row, key in enumerate(keys) if key not in self._places}
        if not new:
            return
        bodies = [key + rows[row].tobytes() for key, row in new.items()]
        content = b"".join(body + _CRC.pack(zlib.crc32(body)) for body in bodies)
        try:
            number = self._open_for_writing() if self._writing is None else self._writing
            start = self._append(self._files[number], content)
        except OSError as error:
            raise _refusal(self._path, error) from error
        self._places |= {key: (number, start + place * self._record) for place, key in enumerate(new)}

    def close(self) -> None:
        """Hands the file over to the disk and to other processes.

        Raises:
            UserError: if the disk does not take it.
        """
        try:
            if self._writing is not None:
                os.fsync(self._files[self._writing])
        except OSError as error:
            raise _refusal(self._path, error) from error
        finally:
            for file in self._files:
                os.close(file)
            self._files, self._writing = [], None

    def __enter__(self) -> FeatureStore:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _open(self, path: Path) -> None:
        """Lists the records of a file. If nobody else writes it, a piece of a record at its end is cut off."""
        writable = os.access(path, os.W_OK)
        file = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        self._files.append(file)
        is_mine = self._writing is None and writable and _lock(file) is True
        size = os.fstat(file).st_size
        if size < _HEADER.size:  # its process was killed, or has just begun
            if is_mine:
                self._begin(file, path)
            return
        magic, width = _HEADER.unpack(os.pread(file, _HEADER.size, 0))
        if magic != _MAGIC or width != self.width:
            found = f"features of {width} numbers, not {self.width}" if magic == _MAGIC else "something else"
            raise UserError(f"{path}: holds {found}; it was not written for this model: remove it")
        whole = (size - _HEADER.size) // self._record
        self._list(file, whole)
        if is_mine:
            os.ftruncate(file, _HEADER.size + whole * self._record)
            self._writing, self._path = len(self._files) - 1, path

    def _list(self, file: int, whole: int) -> None:
        """Notes the places of the records whose bytes are those that were written; the others are encoded again."""
        number, end = len(self._files) - 1, self._record - _CRC.size
        for first in range(0, whole, _READ_RECORDS):
            offset = _HEADER.size + first * self._record
            records = os.pread(file, min(_READ_RECORDS, whole - first) * self._record, offset)
            for place in range(0, len(records) - self._record + 1, self._record):
                body, crc = records[place : place + end], records[place + end : place + self._record]
                if _CRC.pack(zlib.crc32(body)) == crc:
                    self._places[body[:KEY_BYTES]] = (number, offset + place)

    def _open_for_writing(self) -> int:
        while True:
            path = self.folder / f"{uuid.uuid4().hex}{SUFFIX}"
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            if _lock(file) is not False:
                break
            os.close(file)  # another process found it and writes it
        self._files.append(file)
        return self._begin(file, path)

    def _begin(self, file: int, path: Path) -> int:
        os.ftruncate(file, 0)
        self._path = path
        self._append(file, _HEADER.pack(_MAGIC, self.width))
        self._writing = len(self._files) - 1
        return self._writing

    @staticmethod
    def _append(file: int, content: bytes) -> int:
        """Where the content begins; nothing of it is left behind if it does not fit."""
        start = written = os.fstat(file).st_size
        view = memoryview(content)
        try:
            while view:
                count = os.pwrite(file, view, written)
                written, view = written + count, view[count:]
        except OSError:
            os.ftruncate(file, start)
            raise
        return start


def _lock(file: int) -> bool | None:
    """Whether the lock could be had; None where the disk has no locks: files of others are only read there."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _refusal(path: Path, error: OSError) -> UserError:
    fix = "; make room there and start again; what is finished is kept" if is_full(error) else ""
    return UserError(f"cannot write features to {path}: {error.strerror or error}{fix}")
