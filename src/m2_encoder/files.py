"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from m2_encoder.errors import CheckpointError


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file under a temporary name and rename it into place on success.

    Args:
        path: the final file; an existing one is replaced. Its folder must exist.

    Yields:
        The temporary path to write to.

    Raises:
        CheckpointError: if the disk refuses (no folder, no space, no permission).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        if path.is_dir():
            raise CheckpointError(f"cannot write {path}: it is a folder; give the name of a file")
        if not path.parent.is_dir():
            raise CheckpointError(f"cannot write {path}: the folder {path.parent} does not exist; create it first")
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise CheckpointError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Fill a folder under a temporary name and rename it into place on success.

    Args:
        path: the final folder; missing parents are created.
        overwrite: replace an existing folder; otherwise it is an error.

    Yields:
        The temporary folder to fill, beside the final one.

    Raises:
        CheckpointError: if the folder exists and `overwrite` is False, or the disk refuses.
    """
    path = Path(os.path.abspath(path))
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    previous = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
    try:
        if path.exists() and not path.is_dir():
            raise CheckpointError(f"cannot write the folder {path}: a file of that name exists; choose another name")
        if path.exists() and not overwrite:
            raise CheckpointError(f"{path} already exists; choose another folder, or pass overwrite=True to replace it")
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
    except OSError as error:
        raise CheckpointError(f"cannot write the folder {path}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)
