"""Files and folders that appear whole or not at all, JSON files, and digests."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from m2_encoder.errors import UserError


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
        raise error(f"cannot write the folder {path}: {problem}") from problem
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
