"""Downloads remote shards, by any transport of fsspec, into a folder of bounded size.

Processes of a machine share the folder: one downloads, the others wait. A download that stalls or has the wrong size is
tried again. Beside each copy, `.tag` says which version of the shard it is: a number made of what the remote tells of a
file besides its size (ETag, or else checksums and the time of writing).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from annotated_types import Gt, Le

from m2_encoder.bounds import Count, Example, Seconds, Text, check_bounds
from m2_encoder.data.samples.parse import SampleProblem
from m2_encoder.data.shards.index import INDEX_SUFFIX
from m2_encoder.errors import UserError

logger = logging.getLogger(__name__)

_PIECE_BYTES = 4 << 20
_FIRST_PAUSE_S = 0.5  # before the second attempt; doubles
_STALE_PARTIAL_S = 24 * 3600.0
_TAR_SUFFIX = ".shard"
_TAG_SUFFIX = ".tag"
_VALIDATORS = (
    ("etag",),
    ("content-md5", "digest", "md5hash", "md5", "crc32c", "checksum", "last-modified", "lastmodified", "last_modified",
     "updated", "mtime", "modified", "generation"),
)  # fmt: skip
"""What transports of fsspec tell of a file's version, in lower case; of the first of these lists that is there."""


class RemoteFile(NamedTuple):
    """What a remote says of a file."""

    size: int | None  # bytes; None if it does not say
    tag: int  # of its version, 63 bits; 0 if it says nothing


class RemoteShards:
    """Local copies of remote shards.

    Args:
        folder: several runs may share it.
        max_bytes: of all copies together; the longest unused ones are removed. At least the shards of all open
            windows must fit, or they are downloaded again and again.
        timeout_s: longest time without a byte before an attempt ends.
        attempts: downloads of a shard before it counts as unusable.
    """

    @check_bounds
    def __init__(
        self,
        folder: Annotated[Text, Example("cache")],
        *,
        max_bytes: Annotated[float, Gt(0), Le(1e18), Example("2e11")],
        timeout_s: Seconds = 60.0,
        attempts: Annotated[Count, Le(100)] = 4,
    ) -> None:
        self._folder = Path(folder)
        self.max_bytes = int(max_bytes)
        self._timeout_s = timeout_s
        self._attempts = attempts
        self._wanted: queue.SimpleQueue[tuple[str, int | None]] = queue.SimpleQueue()
        self._fetcher: threading.Thread | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the thread: a worker process starts its own."""
        return {**self.__dict__, "_wanted": None, "_fetcher": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._wanted = queue.SimpleQueue()

    def fetch(self, url: str, *, size: int | None = None, tag: int = 0) -> Path:
        """The local copy of a shard, downloaded unless one of `size` bytes (None: any) and `tag` (0: any) is there.

        Raises:
            SampleProblem: shard_missing, shard_changed, remote_timeout or remote_incomplete.
            UserError: if the folder takes no copy.
        """
        path = self._path(url)
        if self._is_there(path, size, tag):
            return path
        with self._own_errors():
            self._folder.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                if not self._is_there(path, size, tag):  # another process was faster
                    self._download(url, path, size, tag)
                    self._evict(path)
        return path

    def prefetch(self, shards: Sequence[tuple[str, int | None]]) -> None:
        """Download shards (url, size) in the background, one by one; errors are left to `fetch`."""
        missing = [(url, size) for url, size in shards if not self._is_there(self._path(url), size, touch=False)]
        if not missing:
            return
        if self._fetcher is None or not self._fetcher.is_alive():
            self._fetcher = threading.Thread(target=self._fetch_wanted, name="prefetch-shards", daemon=True)
            self._fetcher.start()
        for item in missing:
            self._wanted.put(item)

    def stat(self, url: str) -> RemoteFile:
        """Size and version of a remote shard.

        Raises:
            OSError: if it is not there or the remote does not answer in time.
        """
        try:
            found: RemoteFile = self._try(lambda: self._watch(lambda: _remote_file(url), url, lambda: 0), url)
        except SampleProblem as problem:
            raise OSError(problem.detail) from problem
        return found

    def read_head(self, url: str, length: int) -> bytes | None:
        """The first bytes of a small remote file; None if there is none."""

        def read() -> bytes:
            import fsspec

            with fsspec.open(url, "rb") as file:
                return file.read(length)

        with contextlib.suppress(SampleProblem):
            return self._watch(read, url, lambda: 0)
        return None

    def _path(self, url: str) -> Path:
        digest = hashlib.blake2b(url.encode(), digest_size=10).hexdigest()
        return self._folder / f"{digest}{_TAR_SUFFIX}"

    @contextlib.contextmanager
    def _own_errors(self) -> Iterator[None]:
        """Errors of the local folder end the run: they concern all samples."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"data.cache.folder={self._folder} takes no copy ({error.strerror or error}); make room there, choose "
                f"another folder, or a smaller data.cache.max_bytes (now {self.max_bytes:,.0f})"
            ) from error

    def _is_there(self, path: Path, size: int | None, tag: int = 0, *, touch: bool = True) -> bool:
        try:
            status = path.stat()
            if size is not None and status.st_size != size:
                return False
            if tag and _tag_of(path).read_text() != str(tag):
                return False
            if touch:
                os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))  # when it was last used, for `_evict`
        except OSError:
            return False
        return True

    def _fetch_wanted(self) -> None:
        while True:
            url, size = self._wanted.get()
            try:
                self.fetch(url, size=size)
            except (SampleProblem, UserError, OSError) as error:
                logger.info("%s was not fetched ahead: %s", url, error)

    def _download(self, url: str, path: Path, size: int | None, tag: int) -> None:
        partial, now = self._try(lambda: self._copy(url, path, size), url)
        try:
            if tag and now != tag:
                raise SampleProblem("shard_changed", "was replaced on the remote since the run started")
            found = partial.stat().st_size
            if size is not None and found != size:
                raise SampleProblem("shard_changed", f"has {found} bytes, {size} when the run started")
            path.unlink(missing_ok=True)  # before the tag of another version stands beside it
            _tag_of(path).write_text(str(now))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def _copy(self, url: str, path: Path, wanted: int | None) -> tuple[Path, int]:
        """One attempt, in a file of its own, and its tag: an attempt that timed out may still be writing."""
        import fsspec

        partial = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:8]}.partial")
        progress = [0]

        def copy() -> RemoteFile:
            found = _remote_file(url)
            most = max(size for size in (found.size, wanted, 0) if size is not None) or self.max_bytes
            with fsspec.open(url, "rb") as source, self._own_errors_of(partial.open, "wb") as target:
                while piece := source.read(_PIECE_BYTES):
                    self._own_errors_of(target.write, piece)
                    progress[0] += len(piece)
                    if progress[0] > most:  # an endless body
                        raise SampleProblem("remote_incomplete", f"gives more than {most:,} bytes")
                self._own_errors_of(target.flush)
            if found.tag != _remote_file(url).tag:
                raise SampleProblem("remote_incomplete", "was replaced on the remote while it was read")
            return found

        try:
            found: RemoteFile = self._watch(copy, url, lambda: progress[0])
            if found.size is not None and progress[0] != found.size:
                raise SampleProblem("remote_incomplete", f"gave {progress[0]} of {found.size} bytes")
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return partial, found.tag

    def _own_errors_of(self, function: Any, *arguments: Any) -> Any:
        with self._own_errors():
            return function(*arguments)

    def _try(self, attempt: Any, url: str) -> Any:
        """Repeat an attempt that failed, unless the shard is missing."""
        for number in range(self._attempts):
            try:
                return attempt()
            except SampleProblem as problem:  # noqa: PERF203 - a download costs more
                if problem.reason == "shard_missing" or number == self._attempts - 1:
                    raise
                logger.warning("%s: %s; trying again", url, problem)
                time.sleep(_FIRST_PAUSE_S * 2**number)
        raise AssertionError("unreachable: the last attempt raises or returns")

    def _watch(self, work: Any, url: str, progress: Any) -> Any:
        """Run transport code, which may never return, in a thread until `progress()` stands still.

        Raises:
            SampleProblem: remote_timeout, or as `_translate` says.
        """
        result: list[Any] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                result.append(work())
            except BaseException as error:  # handed to the caller below
                errors.append(error)

        thread = threading.Thread(target=run, name=f"download {url}", daemon=True)
        thread.start()
        seen = -1
        while thread.is_alive() and (now := progress()) != seen:
            seen = now
            thread.join(self._timeout_s)
        if thread.is_alive():
            raise SampleProblem("remote_timeout", f"no byte for {self._timeout_s:g} s after {seen}")
        if errors:
            raise _translate(errors[0]) from errors[0]
        return result[0]

    def _evict(self, newest: Path) -> None:
        """Remove the longest unused copies until the rest fits; processes that have one open can still read it."""
        found = []
        for path in self._folder.iterdir():
            with contextlib.suppress(OSError):
                status = path.stat()
                if path.suffix == _TAR_SUFFIX and path != newest:
                    found.append((status.st_atime_ns, status.st_size, path))
                elif path.suffix == ".partial" and time.time() - status.st_mtime > _STALE_PARTIAL_S:
                    path.unlink()
        total = newest.stat().st_size + sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.max_bytes:
                return
            path.unlink(missing_ok=True)
            path.with_name(path.name + INDEX_SUFFIX).unlink(missing_ok=True)
            _tag_of(path).unlink(missing_ok=True)
            total -= size


def _tag_of(path: Path) -> Path:
    return path.with_suffix(_TAG_SUFFIX)


def _remote_file(url: str) -> RemoteFile:
    import fsspec

    system, path = fsspec.core.url_to_fs(url)
    system.invalidate_cache(path)
    facts = {str(key).lower(): value for key, value in system.info(path).items()}
    size = facts.get("size")
    known = ([(name, str(facts[name])) for name in names if facts.get(name)] for names in _VALIDATORS)
    validators = next(filter(None, known), None)
    digest = hashlib.blake2b(repr(validators).encode(), digest_size=8).digest()
    tag = 0 if validators is None else (int.from_bytes(digest, "big") >> 1) | 1
    return RemoteFile(None if size is None else int(size), tag)


def _translate(error: BaseException) -> UserError:
    """A transport's error as one of ours."""
    if isinstance(error, UserError):
        return error
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, FileNotFoundError):
        return SampleProblem("shard_missing", text)
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):  # two classes before Python 3.11
        return SampleProblem("remote_timeout", text)
    return SampleProblem("remote_incomplete", text)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
