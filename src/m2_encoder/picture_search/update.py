"""Writes an index: what is new or changed is encoded, what is gone is left out, the rest stays as it is.

A picture is known by path, size and time of its file. Features are kept in `encoding/` as they are made, by the content
of the file; `index.json` is replaced at the end. So a process that is killed at any moment loses the batch that it was
at, and the next one goes on.

Letters: N pictures · D feature dim.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from m2_encoder.errors import UserError, abridge, name_some
from m2_encoder.evaluation.embedding import Item, Skipped
from m2_encoder.evaluation.features import FeatureEncoder
from m2_encoder.evaluation.inputs import list_images
from m2_encoder.evaluation.models.base import import_peer
from m2_encoder.evaluation.sets.pictures import FilePictures
from m2_encoder.files import LockedError, atomic_file, hold_lock, write_text
from m2_encoder.picture_search.index import (
    ENCODING_FOLDER,
    FORMAT,
    INDEX_FILE,
    LOCK_FILE,
    VERSION,
    PictureIndex,
    find_file,
    open_index,
    read_content,
)
from m2_encoder.picture_search.model import SearchModel, require_same

LARGE: Final = 200_000
"""Pictures, above which an index gets a graph of neighbours unless told otherwise."""

_FEATURES: Final = "features-"
_NEIGHBOURS: Final = "neighbours-"
_NOT_UTF8: Final = "its name is not UTF-8; rename it, for example with: convmv -f gb18030 -t utf-8 --notest"
_OUTSIDE: Final = "is a link to a file outside of the folder; copy that here, or index its own folder"
_BATCHES_AT_ONCE: Final = 8  # between two reports
_ROWS_AT_ONCE: Final = 65536  # that are written

DType = Literal["float16", "float32"]
Report = Callable[[int, int, int], object]


class Changes(NamedTuple):
    """What an update found, in pictures."""

    new: int
    changed: int  # encoded again
    deleted: int
    unchanged: int
    skipped: list[Skipped]  # without a feature, and why


class _Listed(NamedTuple):
    """Pictures of the folder, sorted by name."""

    names: list[str]
    sizes: list[int]
    times: list[int]
    skipped: list[Skipped]
    unreadable: list[str]  # folders, as prefixes of names


class _File(NamedTuple):
    size: int
    time: int


class _Work(NamedTuple):
    """What one update works on, and how."""

    folder: Path
    root: Path
    model: SearchModel
    before: PictureIndex | None
    dtype: np.dtype[Any]
    neighbours: bool | None
    batch_size: int
    num_workers: int
    report: Report


class _Found(NamedTuple):
    """What the new index holds."""

    names: list[str]
    files: dict[str, _File]  # of these and perhaps more names
    made: dict[str, npt.NDArray[Any]]  # features that the index before did not have, (D,)
    skipped: list[Skipped]


def update_index(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str],
    model: SearchModel,
    *,
    dtype: DType = "float16",
    neighbours: bool | None = None,
    batch_size: int = 64,
    num_workers: int = 4,
    report: Report = lambda done, total, skipped: None,
) -> Changes:
    """Brings an index up to date with its folder of pictures, or makes it.

    Args:
        path: of the index; missing folders are made.
        root: the folder of the pictures.
        model: what encodes them; for an existing index the one that made it.
        dtype: of the features on disk; an existing index keeps its own.
        neighbours: whether a graph of neighbours is made, by usearch; None for large indexes.
        batch_size: pictures per forward pass.
        num_workers: threads that read and decode ahead.
        report: is told how many of how many pictures are done, and how many of them were skipped.

    Raises:
        UserError: for a folder without a picture that can be used, an index of another model or folder, one that
            another process writes, and a disk that does not take it. The index is as it was then.
    """
    folder, root = Path(os.path.abspath(path)), Path(os.path.abspath(root))
    check_index_folder(folder, root)
    try:
        with hold_lock(folder / LOCK_FILE):
            before = open_index(folder) if (folder / INDEX_FILE).is_file() else None
            if before is not None:
                require_same(before, model.made_by)
            stored = np.dtype(dtype) if before is None else before.features.dtype
            return _update(_Work(folder, root, model, before, stored, neighbours, batch_size, num_workers, report))
    except LockedError as error:
        whom = "another process" if error.holder is None else error.holder.describe()
        raise UserError(f"{folder}: another m2-search index writes it ({whom}); wait for it, or end it") from error
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error


def check_index_folder(folder: Path, root: Path) -> None:
    """Refuse what is no index, and an index of another folder that is still there.

    Raises:
        UserError: its key is `output`.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError("is a file; give the name of a folder", key="output", value=str(folder))
    if not folder.is_dir():
        return
    if not (folder / INDEX_FILE).is_file():
        if foreign := sorted(each.name for each in folder.iterdir() if not _is_own(each.name)):
            rule = f"is a folder with other files in it ({name_some(foreign, 3)}); give another name"
            raise UserError(rule, key="output", value=str(folder))
        return
    before = open_index(folder).root
    if before != root and before.is_dir() and not before.samefile(root):
        raise UserError(f"is the index of {before}; give another name", key="output", value=str(folder))


def _update(work: _Work) -> Changes:
    old = {} if work.before is None else _files_of(work.before)
    listed = _list(work.root, work.folder)
    _keep_unreadable(listed, old)
    now = {name: _File(*each) for name, *each in zip(listed.names, listed.sizes, listed.times, strict=True)}
    if _wants_graph(work, len(now)):
        _import_usearch()  # before hours of encoding
    made, skipped = _encode(work, [name for name, file in now.items() if old.get(name) != file])
    skipped = sorted([*listed.skipped, *skipped])
    left_out = {each.name for each in skipped}
    names = sorted(name for name in now if name not in left_out)
    if not names:
        said = name_some([f"{each.name} ({each.reason})" for each in skipped], 3)
        raise UserError(f"{work.root}: no picture could be used: {said}")
    _write(work, _Found(names, now, made, skipped))
    return Changes(
        new=sum(name not in old for name in made),
        changed=sum(name in old for name in made),
        deleted=sum(name not in now or name in left_out for name in old),
        unchanged=len(names) - len(made),
        skipped=skipped,
    )


def _files_of(index: PictureIndex) -> dict[str, _File]:
    return {
        name: _File(size, time)
        for name, size, time in zip(index.names, index.sizes.tolist(), index.times.tolist(), strict=True)
    }


def _list(root: Path, index: Path) -> _Listed:
    """The pictures of a folder, without those of the index itself.

    Raises:
        UserError: if there are none.
    """
    listed = _Listed([], [], [], [], [])
    for item in list_images(root):
        if Path(item.content).is_relative_to(index):
            continue
        found = _stat(item, root)
        if isinstance(found, str):
            listed.skipped.append(Skipped(item.name, found))
            if os.path.isdir(item.content):
                listed.unreadable.append("" if item.name == "." else f"{item.name}/")
        else:
            listed.names.append(item.name)
            listed.sizes.append(found.size)
            listed.times.append(found.time)
    if not listed.names and not listed.skipped:
        raise UserError("no picture in it", key="photos", value=str(root))
    return listed


def _stat(item: Item, root: Path) -> _File | str:
    """Size and time of a picture's file, before it is read; or why it cannot be used."""
    if item.problem:
        return item.problem
    try:
        os.fspath(item.content).encode()
        if os.path.islink(item.content) and find_file(root, item.content) is None:
            return _OUTSIDE
        found = os.stat(item.content)
    except UnicodeEncodeError:
        return _NOT_UTF8
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return _File(found.st_size, found.st_mtime_ns)


def _keep_unreadable(listed: _Listed, old: dict[str, _File]) -> None:
    """Pictures of folders that cannot be read now are not taken for deleted."""
    for name, file in old.items():
        if any(name.startswith(folder) for folder in listed.unreadable):
            listed.names.append(name)
            listed.sizes.append(file.size)
            listed.times.append(file.time)


def _encode(work: _Work, names: Sequence[str]) -> tuple[dict[str, npt.NDArray[Any]], list[Skipped]]:
    """Features of pictures by name, (D,) each, and which have none; what was encoded before is read from the disk."""
    made: dict[str, npt.NDArray[Any]] = {}
    skipped: list[Skipped] = []
    work.report(0, len(names), 0)
    size, store = work.batch_size, work.folder / ENCODING_FOLDER
    with FeatureEncoder(work.model.encoder, store=store, batch_size=size, num_workers=work.num_workers) as encoder:
        for start in range(0, len(names), size * _BATCHES_AT_ONCE):
            part = names[start : start + size * _BATCHES_AT_ONCE]
            found = encoder.encode_pictures(FilePictures(work.root, part))
            rows = found.features.numpy().astype(work.dtype)
            made |= {part[row]: feature for row, feature in zip(found.kept.tolist(), rows, strict=True)}
            skipped += [Skipped(each.name, _without_path(each.reason, work.root)) for each in found.left_out]
            work.report(start + len(part), len(names), len(skipped))
    return made, skipped


def _without_path(reason: str, root: Path) -> str:
    """The reason alone: the name stands beside it."""
    _, separator, said = reason.rpartition(": ") if reason.startswith(str(root)) else ("", "", reason)
    return abridge(said if separator else reason, 200)


def _write(work: _Work, found: _Found) -> None:
    """Writes the files that differ, then `index.json`, and removes what that does not name."""
    folder, before, names = work.folder, work.before, found.names
    features, neighbours = f"{_FEATURES}{uuid.uuid4().hex[:12]}.npy", None
    if before is not None and not found.made and before.names == names:
        features = str(read_content(folder)["features"])
        neighbours = None if before.neighbours is None else before.neighbours.name
    else:
        _write_features(folder / features, work, found)
    if not _wants_graph(work, len(names)):
        neighbours = None
    elif neighbours is None:
        neighbours = write_neighbours(folder, features)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "root": str(work.root),
        "model": work.model.made_by._asdict(),
        "features": features,
        "neighbours": neighbours,
        "skipped": found.skipped,
        "names": names,
        "sizes": [found.files[name].size for name in names],
        "times": [found.files[name].time for name in names],
    }
    write_text(folder / INDEX_FILE, json.dumps(content, ensure_ascii=False))
    remove_leftovers(folder, {features, neighbours})


def _write_features(path: Path, work: _Work, found: _Found) -> None:
    old = {} if work.before is None else work.before.rows
    before = np.empty((0, 0)) if work.before is None else work.before.features
    shape = (len(found.names), work.model.encoder.facts.embed_dim)
    header = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(work.dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    with atomic_file(path) as temporary, temporary.open("wb") as file:  # not mapped: a full disk would be a signal
        file.write(header.getvalue())
        for start in range(0, len(found.names), _ROWS_AT_ONCE):
            part = found.names[start : start + _ROWS_AT_ONCE]
            rows = [found.made[name] if name in found.made else before[old[name]] for name in part]
            file.write(np.stack(rows).tobytes())


def write_neighbours(folder: Path, features: str) -> str:
    """A graph of neighbours over features of float16, by usearch.

    Raises:
        UserError: without usearch.
    """
    usearch = _import_usearch()
    rows = np.load(folder / features, mmap_mode="r", allow_pickle=False)
    graph = usearch.Index(ndim=rows.shape[1], metric="ip", dtype="f16")
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = np.asarray(rows[start : start + _ROWS_AT_ONCE])
        graph.add(np.arange(start, start + len(part)), part)
    name = f"{_NEIGHBOURS}{uuid.uuid4().hex[:12]}.usearch"
    with atomic_file(folder / name) as temporary:
        graph.save(str(temporary))
    return name


def _wants_graph(work: _Work, count: int) -> bool:
    return count > LARGE if work.neighbours is None else work.neighbours


def _import_usearch() -> Any:
    what = f"indexes of more than {LARGE:,} pictures, or with neighbours=true,"
    return import_peer("usearch.index", what, extra="usearch")


def remove_leftovers(folder: Path, named: Iterable[str | None]) -> None:
    """Removes files of earlier indexes and of processes that were killed; a reader that has them open keeps them."""
    keep = {INDEX_FILE, LOCK_FILE, *named}
    for each in folder.iterdir():
        if each.name in keep or not _is_own(each.name):
            continue
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(each) if each.is_dir() else each.unlink()


def _is_own(name: str) -> bool:
    """Whether a file of an index's folder is one that an index writes, finished or not."""
    plain = name.removeprefix(".")
    return plain.startswith((INDEX_FILE, _FEATURES, _NEIGHBOURS)) or plain in (LOCK_FILE, ENCODING_FOLDER)
