"""Files and folders that appear whole or not at all, JSON files, digests, and locks of living processes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from m2_encoder.errors import UserError

FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def is_full(error: object) -> bool:
    """Whether an error says that a disk takes no more; torch says so in words of its own."""
    return getattr(error, "errno", None) in FULL or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in ("inline_container", "PytorchStream"))
    )


@contextmanager
def atomic_file(
    path: str | os.PathLike[str], *, key: str | None = None, error: type[UserError] = UserError
) -> Iterator[Path]:
    """Writes a file under a temporary name, which it yields, and renames it on success; an existing file is replaced.

    Args:
        path: its folder must exist.
        key: argument of a command that gave the path; messages name it, and missing folders are made.
        error: class of errors.

    Raises:
        UserError: if the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")

    def refusal(reason: object) -> UserError:
        if key is None and is_full(reason):
            words = getattr(reason, "strerror", None) or "the disk did not take all of it"
            return error(f"cannot write {path}: {words}; make room there and start again; what is finished is kept")
        if key is None:
            return error(f"cannot write {path}: {reason}")
        return error(f"cannot be written ({reason}); give another place", key=key, value=path)

    try:
        if path.is_dir():
            raise refusal("it is a folder; give the name of a file")
        if key is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        elif not path.parent.is_dir():
            raise refusal(f"the folder {path.parent} does not exist; create it first")
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as problem:  # of torch.save, if the disk is full
        raise refusal(problem if key is None else getattr(problem, "strerror", None) or problem) from problem
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_folder(
    path: str | os.PathLike[str], *, overwrite: bool = False, error: type[UserError] = UserError
) -> Iterator[Path]:
    """Fills a folder under a temporary name, which it yields, and renames it on success; missing parents are made.

    Raises:
        UserError: if the folder exists and `overwrite` is False, or it cannot be written.
    """
    path = Path(os.path.abspath(path))
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    previous = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
    try:
        if path.exists() and not path.is_dir():
            raise error(f"cannot write the folder {path}: a file of that name exists; choose another name")
        if path.exists() and not overwrite:
            raise error(f"{path} already exists; choose another folder, or pass overwrite=True to replace it")
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            os.rename(path, previous)
        try:
            os.rename(temporary, path)
        except OSError:
            if previous.exists():
                os.rename(previous, path)
            raise
    except OSError as problem:
        more = "; make room there and start again; what is finished is kept" if is_full(problem) else ""
        raise error(f"cannot write the folder {path}: {problem}{more}") from problem
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)


def write_text(path: str | os.PathLike[str], content: str, *, key: str | None = None) -> None:
    """Writes a UTF-8 file, whole or not at all; arguments and errors are those of `atomic_file`."""
    with atomic_file(path, key=key) as temporary:
        temporary.write_text(content, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: object, *, key: str | None = None) -> None:
    """Writes a JSON file, whole or not at all; arguments and errors are those of `atomic_file`."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n", key=key)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def describe_changes(before: Mapping[str, object], now: Mapping[str, object]) -> str | None:
    """What differs between two records of files by name, such as digests; None if nothing does.

    >>> describe_changes({"a.tar": 1, "b.tar": 2}, {"a.tar": 3})
    'its a.tar has changed (and 1 more)'
    """
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if not names:
        return None
    first, more = names[0], f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    what = "is missing" if first not in now else "has changed" if first in before else "was added"
    return f"its {first} {what}{more}"


class Holder(NamedTuple):
    """The process that holds a lock, or held it when it was killed."""

    host: str
    pid: int
    since: str  # local time, to the second

    def describe(self) -> str:
        """Such as "pid 4711 on node-3, since 2026-11-29 02:50:31"."""
        return f"pid {self.pid} on {self.host}, since {self.since}"


class LockedError(UserError):
    """Another process that lives holds a lock; `holder` is that, as far as it is known."""

    def __init__(self, text: str, *, holder: Holder | None = None) -> None:
        super().__init__(text)
        self.holder = holder


@contextmanager
def hold_lock(path: str | os.PathLike[str]) -> Iterator[Holder | None]:
    """Holds a lock that ends with the process, however that ends; yields who was killed while holding it.

    The file says who holds the lock and is removed with it; the lock itself is the kernel's (POSIX, also over NFS), is
    not shared with forked processes, and is lost if this process opens and closes the file. On a disk without locks
    the file alone counts, as long as its process lives on this machine.

    Raises:
        LockedError: if another process holds it.
        UserError: if the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            is_locked = _try_lock(file)
            left = _read_holder(file)
            if is_locked is False or (is_locked is None and left is not None and _lives(left)):
                whom = "another process" if left is None else left.describe()
                raise LockedError(f"{path} is held by {whom}", holder=left)
            with suppress(FileNotFoundError):
                if os.fstat(file).st_ino == path.stat().st_ino:
                    break  # else its last holder has just removed it
        except BaseException:
            os.close(file)
            raise
        os.close(file)
    me = Holder(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"))
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(me._asdict()).encode(), 0)
        yield left
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(file)


def find_holder(path: str | os.PathLike[str]) -> Holder | None:
    """The living process that holds a lock of `hold_lock`; None if there is none. Not for the holder itself."""
    path = Path(path)
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        is_locked, left = _try_lock(file), _read_holder(file)
    finally:
        os.close(file)
    if is_locked is None:
        return left if left is not None and _lives(left) else None
    return None if is_locked else left or Holder("this or another machine", 0, "now")


def _try_lock(file: int) -> bool | None:
    """Whether the lock could be had; None where the disk has no locks."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def _read_holder(file: int) -> Holder | None:
    try:
        content = json.loads(
            os.pread(file, 4096, 0)
        )  # through the file that has the lock: closing another would end it
        return Holder(str(content["host"]), int(content["pid"]), str(content["since"]))
    except (OSError, ValueError, KeyError, TypeError):  # empty, cut, or somebody else's
        return None


def _lives(holder: Holder) -> bool:
    """Whether a process of this machine, and not this one, is still there."""
    if holder.host != socket.gethostname() or holder.pid == os.getpid():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
