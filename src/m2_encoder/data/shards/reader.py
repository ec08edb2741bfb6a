"""Reads samples by shard and number, from tars that stay open.

Samples of a shard that is gone or has changed since the start of the run are unusable, never wrong.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from m2_encoder.data.samples.parse import SampleProblem
from m2_encoder.data.shards.index import (
    INDEX_SUFFIX,
    IndexHeader,
    Member,
    ShardFault,
    count_samples,
    find_files,
    open_index,
    parse_header,
    parse_index,
)
from m2_encoder.data.shards.paths import is_remote
from m2_encoder.data.shards.remote import RemoteShards
from m2_encoder.errors import UserError

MAX_OPEN_SHARDS = 256
"""Tars that a process keeps open; systems commonly allow 1,024 files."""

_COPY_ATTEMPTS = 4
_MAX_INDEX_BYTES = 1 << 30
_RETRY_AFTER_S = 600.0  # a remote shard that failed is not asked for again before


class SampleBytes(NamedTuple):
    """The files of one sample."""

    key: str  # as in the tar
    image: bytes  # the image file
    json: bytes | None  # its `.json`; None without one
    text: bytes | None  # its `.txt`; None without one
    files: Mapping[str, bytes] = {}  # its further files that were asked for, by extension


class OpenShard:
    """A local tar, opened, with its index.

    Args:
        path: of the tar.
        size: bytes it must have; None accepts any.
        written: time of last writing that it must have, ns; 0 accepts any.
        write_index: write a new index beside the tar.

    Raises:
        SampleProblem: shard_changed for another tar than expected; shard_missing if it is no file.
        OSError: if it cannot be read.
    """

    def __init__(self, path: str, *, size: int | None = None, written: int = 0, write_index: bool = True) -> None:
        if not stat.S_ISREG(os.stat(path).st_mode):
            reason = "shard_missing" if size is None else "shard_changed"
            raise SampleProblem(reason, "is no ordinary file")  # opening a pipe would wait
        self.descriptor = os.open(path, os.O_RDONLY)
        try:
            status = os.fstat(self.descriptor)
            if size is not None and status.st_size != size:
                raise SampleProblem("shard_changed", f"has {status.st_size} bytes, {size} when the run started")
            if written and status.st_mtime_ns != written:
                raise SampleProblem("shard_changed", "was written anew since the run started")
            self.index = open_index(path, write=write_index)
            if (status.st_size, status.st_mtime_ns) != (self.index.size, self.index.written):
                raise SampleProblem("shard_changed", "was written anew while it was opened")
        except BaseException:
            os.close(self.descriptor)
            raise

    def close(self) -> None:
        """Close the tar."""
        os.close(self.descriptor)

    def read(self, number: int, *, files: Sequence[str] = (), image: bool = True) -> SampleBytes:
        """The files of a sample, with those of further extensions (lower case); without `image`, that is left out: b"".

        Raises:
            SampleProblem: shard_changed or shard_missing.
        """
        descriptor = self.descriptor
        try:
            status = os.fstat(descriptor)
            if (status.st_size, status.st_mtime_ns) != (self.index.size, self.index.written):
                raise SampleProblem("shard_changed", "was written anew while the run read it")
            sample = self.index[number]
            more = find_files(descriptor, self.index, number, files) if files else {}
            return SampleBytes(
                sample.key,
                _read(descriptor, sample.image) if image else b"",
                None if sample.json is None else _read(descriptor, sample.json),
                None if sample.text is None else _read(descriptor, sample.text),
                {extension: _read(descriptor, member) for extension, member in more.items()},
            )
        except IndexError as error:
            raise SampleProblem("shard_changed", str(error)) from error
        except OSError as error:
            raise SampleProblem("shard_missing", str(error)) from error


class ShardReader:
    """Reads samples of local and remote shards; one reader per process.

    Args:
        remote: None refuses urls.
        max_open: tars to keep open.
        files: extensions of further files of each sample to read, in lower case.
    """

    def __init__(
        self, *, remote: RemoteShards | None = None, max_open: int = MAX_OPEN_SHARDS, files: Sequence[str] = ()
    ) -> None:
        self._remote = remote
        self._files = tuple(files)
        self._max_open = max_open
        self._open: OrderedDict[str, OpenShard] = OrderedDict()
        self._failed: dict[str, tuple[float, SampleProblem]] = {}

    def __getstate__(self) -> dict[str, object]:
        """Without open files: a worker process opens its own."""
        return {**self.__dict__, "_open": OrderedDict(), "_failed": {}}

    def measure(self, shard: str) -> IndexHeader:
        """Header of a shard's index, of a remote shard with the tag of its version as time of writing.

        A remote shard without an `.index` beside it is downloaded; a copy of another version is not used.

        Raises:
            OSError: if the shard cannot be read.
            UserError: for a url without a folder for copies.
        """
        if not is_remote(shard):
            return count_samples(_path(shard))
        remote = self._need_remote(shard)
        size, tag = remote.stat(shard)
        head = parse_header(remote.read_head(f"{shard}{INDEX_SUFFIX}", 4096) or b"")
        if head is not None and head.size == size:
            return head._replace(written=tag)
        try:
            counted = count_samples(remote.fetch(shard, size=size, tag=tag))
        except SampleProblem as problem:
            raise OSError(str(problem)) from problem
        return counted._replace(written=tag)  # not of the copy

    def faults(self, shard: str) -> tuple[ShardFault, ...]:
        """What is unusable in a shard, by its headers. A remote shard without an `.index` beside it is downloaded.

        Raises:
            OSError: if the shard cannot be read.
        """
        if not is_remote(shard):
            return open_index(_path(shard)).faults
        remote = self._need_remote(shard)
        index = parse_index(remote.read_head(f"{shard}{INDEX_SUFFIX}", _MAX_INDEX_BYTES) or b"")
        if index is None:
            try:
                index = open_index(remote.fetch(shard))
            except SampleProblem as problem:
                raise OSError(str(problem)) from problem
        return index.faults

    def read(self, shard: str, number: int, *, size: int, written: int = 0) -> SampleBytes:
        """The files of a sample of a tar that had this size and time of writing (0: unknown) at the start of the run.

        Of a remote shard, the time of writing is the tag of its version (`measure`).

        Raises:
            SampleProblem: shard_missing, shard_changed, remote_timeout or remote_incomplete.
            UserError: for a url without a folder for copies, or a folder that takes none.
        """
        opened = self._open.get(shard)
        if opened is None:
            opened = self._open_shard(shard, size, written)
        else:
            self._open.move_to_end(shard)
        return opened.read(number, files=self._files)

    def key(self, shard: str, number: int) -> str | None:
        """Name of a sample of an open shard; None if it is not open or has no such sample."""
        opened = self._open.get(shard)
        return opened.index[number].key if opened is not None and number < len(opened.index) else None

    def prefetch(self, shards: list[tuple[str, int]]) -> None:
        """Download the remote ones among these shards (path or url, size) in the background."""
        remote = [(shard, size) for shard, size in shards if is_remote(shard)]
        if remote and self._remote is not None:
            self._remote.prefetch(remote)

    def close(self) -> None:
        """Close the tars that are open; the next read opens its own again."""
        while self._open:
            self._open.popitem()[1].close()

    def _open_shard(self, shard: str, size: int, written: int) -> OpenShard:
        failed = self._failed.get(shard)
        if failed is not None and time.monotonic() < failed[0]:
            raise failed[1]
        try:
            opened = self._open_copy(shard, size, written) if is_remote(shard) else _open(_path(shard), size, written)
        except SampleProblem as problem:
            if is_remote(shard):
                self._failed[shard] = time.monotonic() + _RETRY_AFTER_S, problem
            raise
        self._open[shard] = opened
        while len(self._open) > self._max_open:
            self._open.popitem(last=False)[1].close()
        return opened

    def _open_copy(self, shard: str, size: int, tag: int) -> OpenShard:
        remote = self._need_remote(shard)
        for _ in range(_COPY_ATTEMPTS):
            path = remote.fetch(shard, size=size, tag=tag)
            with contextlib.suppress(_GoneError):  # another process has made room since
                return _open(str(path), size, 0)
        raise UserError(
            f"{shard}: its copy is removed before it can be read; data.cache.max_bytes is too small for what is open"
        )

    def _need_remote(self, shard: str) -> RemoteShards:
        if self._remote is None:
            raise UserError(f"{shard} is remote: give data.cache.folder, where copies of remote shards are kept")
        return self._remote


class _GoneError(SampleProblem):
    """There is no such file."""


def _open(path: str, size: int, written: int) -> OpenShard:
    try:
        return OpenShard(path, size=size, written=written)
    except OSError as error:
        raise _GoneError("shard_missing", error.strerror or str(error)) from error


def _path(shard: str) -> str:
    return shard.removeprefix("file://")


def _read(descriptor: int, member: Member) -> bytes:
    content = os.pread(descriptor, member.size, member.offset)
    if len(content) != member.size:
        raise SampleProblem("shard_changed", f"gives {len(content)} of {member.size} bytes at {member.offset}")
    return content
