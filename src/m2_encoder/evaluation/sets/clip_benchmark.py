"""CLIP_benchmark's web datasets: `SPLIT/nshards.txt`, `SPLIT/0.tar`, …, and lists of classes and templates beside.

A sample is a picture with `cls` (the number of its class), `npy` (for each class whether it is there) or `txt`
(captions, one a line). Samples are found in the tars' headers and read by offset, in the order in which they lie there:
with several workers, webdataset gives another one.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m2_encoder.data.shards.grouping import group_members
from m2_encoder.data.shards.tar_scan import UNREADABLE, TarMember, scan_tar
from m2_encoder.errors import UserError, name_some
from m2_encoder.evaluation.prompts import check_templates
from m2_encoder.evaluation.sets.base import EvaluationSet
from m2_encoder.evaluation.sets.labels import count_classes, make_classes, read_names
from m2_encoder.evaluation.sets.layouts import expect
from m2_encoder.evaluation.sets.pictures import PartPictures
from m2_encoder.evaluation.sets.published import compare_size
from m2_encoder.evaluation.sets.texts import count_texts, find_language, make_texts, read_lines

_PICTURES: Final = ("webp", "png", "jpg", "jpeg")  # of several the first, as CLIP_benchmark does
_LABELS: Final = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}
_POINTER: Final = b"version https://git-lfs"  # what stands in a file that was not fetched
_CLASSES, _TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"


class _Samples(NamedTuple):
    names: list[str]
    parts: list[tuple[int, int, int]]  # shard, offset, size of each picture
    labels: list[bytes]  # what stands beside each picture


def read_clip_benchmark(
    path: str | os.PathLike[str], *, split: str = "test", name: str | None = None, language: str | None = None
) -> EvaluationSet:
    """Read a set that `clip_benchmark_export_wds` wrote, or one downloaded from its hub.

    Args:
        path: of the folder that holds the splits.
        split: which one.
        name: in tables; by default that of the folder without "wds_".
        language: of captions, names and templates; None tells it by their script.

    Raises:
        UserError: for another layout, a shard that is missing or cut, a sample without a picture or label, lists that
            do not fit, and a template without a place for the name.
    """
    root = expect(path, "clip_benchmark")
    kind = _read_kind(root)
    shards = _list_shards(root, split)
    found = _read_shards(shards, _LABELS[kind])
    pictures = PartPictures(found.names, shards, np.array(found.parts, np.int64).reshape(-1, 3))
    own = name or root.resolve().name.removeprefix("wds_")
    read = EvaluationSet(name=own, pictures=pictures, source=str(root), counts={"pictures": len(pictures)})
    finish = _with_captions if kind == "retrieval" else _with_classes
    return finish(read, root, found, language)


def _with_captions(read: EvaluationSet, root: Path, found: _Samples, language: str | None) -> EvaluationSet:
    rows: list[str] = []
    numbers: list[int] = []
    for number, content in enumerate(found.labels):
        own = _decode(content, found.names[number]).splitlines()  # as CLIP_benchmark divides it
        rows += own
        numbers += [number] * len(own)
    if not rows:
        raise UserError(f"{root}: no captions in it")
    texts = {language or find_language(rows, str(root)): make_texts(rows, numbers)}
    without = len(found.labels) - len(set(numbers))
    counts = {**read.counts, **count_texts(texts), "pictures_without_text": without}
    return compare_size(dataclasses.replace(read, texts=texts, counts=counts))


def _with_classes(read: EvaluationSet, root: Path, found: _Samples, language: str | None) -> EvaluationSet:
    if not (root / _CLASSES).is_file():
        raise UserError(f"{root}: {_CLASSES} is not there, so its classes have no names; download it")
    names = read_names(root / _CLASSES)
    language = language or find_language(names, str(root / _CLASSES))
    templates: dict[str, tuple[str, ...]] = {}
    if (file := root / _TEMPLATES).is_file():
        templates[language] = check_templates(read_lines(file), str(file))
    read_label = _vector if _read_kind(root) == "multilabel" else _number
    targets = _targets(found, read_label)
    where = str(root / _CLASSES)
    classes = make_classes(f"{read.name}/{_CLASSES}", {language: names}, targets, where=where, templates=templates)
    counts = {**read.counts, **count_classes(classes)}
    return compare_size(dataclasses.replace(read, classes=classes, counts=counts))


def _read_kind(root: Path) -> str:
    file = root / "dataset_type.txt"
    kind = read_lines(file)[0].lower() if file.is_file() else "classification"
    if kind not in _LABELS:
        raise UserError(f"{file}: says {kind}; wanted {', '.join(_LABELS)}")
    return kind


def _list_shards(root: Path, split: str) -> list[str]:
    folder = root / split
    count_file = folder / "nshards.txt"
    if not count_file.is_file():
        splits = sorted(file.parent.name for file in root.glob("*/nshards.txt"))
        raise UserError(f"{root}: has no split {split} with nshards.txt; choose split={'|'.join(splits)}")
    said = read_lines(count_file)[0]
    if not said.isdecimal() or not int(said):
        raise UserError(f"{count_file}: says {said!r}; wanted the number of tars")
    wanted = {f"{number}.tar" for number in range(int(said))}
    there = {file.name for file in folder.glob("*.tar")}
    if missing := sorted(wanted - there):
        raise UserError(
            f"{folder}: {len(missing):,} of {said} tars are missing: {name_some(missing, 3)}; complete the download"
        )
    if more := sorted(there - wanted):
        raise UserError(
            f"{folder}: holds {name_some(more, 3)}, but nshards.txt says {said}; remove them, or correct it"
        )
    return [str(folder / f"{number}.tar") for number in range(int(said))]


def _read_shards(shards: list[str], label: str) -> _Samples:
    found = _Samples([], [], [])
    for number, shard in enumerate(shards):
        with open(shard, "rb") as file:
            for key, members in _scan(shard, file.fileno()).items():
                picture, beside = _members(shard, key, members, label)
                extension = picture.name.rpartition(".")[2]
                found.names.append(f"{Path(shard).name}:{key}.{extension}")
                found.parts.append((number, picture.offset, picture.size))
                found.labels.append(os.pread(file.fileno(), beside.size, beside.offset))
    if not found.names:
        raise UserError(f"{Path(shards[0]).parent}: no sample in its {len(shards)} tars")
    return found


def _scan(shard: str, descriptor: int) -> dict[str, dict[str, TarMember]]:
    scan = scan_tar(descriptor, size=os.fstat(descriptor).st_size)
    if os.pread(descriptor, len(_POINTER), 0) == _POINTER:
        raise UserError(f"{shard}: is a pointer of Git LFS, not the tar itself; fetch it with: git lfs pull")
    if scan.problem is not None:
        raise UserError(f"{shard}: is no whole tar: {scan.problem}; download it again")
    grouped, again = group_members(scan.members, pictures=_PICTURES)
    if again:
        raise UserError(f"{shard}: several samples are called {next(iter(again))}; write the shard again")
    return grouped


def _members(shard: str, key: str, members: Mapping[str, TarMember], label: str) -> tuple[TarMember, TarMember]:
    usable = {extension: member for extension, member in members.items() if member.size != UNREADABLE}
    picture = next((usable[each] for each in _PICTURES if each in usable), None)
    beside = usable.get(label)
    if picture is None or beside is None:
        wanted = label if beside is None else " or ".join(_PICTURES)
        hint = "; dataset_type.txt says which of cls, npy and txt" if beside is None else ""
        raise UserError(f"{shard}: sample {key} has {', '.join(usable) or 'nothing'}, wanted {wanted}{hint}")
    return picture, beside


def _targets(found: _Samples, read_label: Callable[[bytes, str], npt.NDArray[np.generic]]) -> Tensor:
    rows = [read_label(content, name) for content, name in zip(found.labels, found.names, strict=True)]
    if odd := [name for name, row in zip(found.names, rows, strict=True) if row.shape != rows[0].shape]:
        raise UserError(f"{odd[0]}: its label has another length than that of {found.names[0]}")
    return torch.from_numpy(np.stack(rows))


def _number(content: bytes, name: str) -> npt.NDArray[np.generic]:
    try:
        return np.array(int(content), np.int64)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{name}: its class is {content[:20]!r}, no whole number") from error


def _vector(content: bytes, name: str) -> npt.NDArray[np.generic]:
    try:
        value = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{name}: its npy cannot be read: {error}") from error
    if value.ndim != 1:
        raise UserError(f"{name}: its npy has the shape {value.shape}; wanted one number for each class")
    return np.asarray(value != 0)


def _decode(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: its captions are not UTF-8 at byte {error.start}; write the shard again") from error
