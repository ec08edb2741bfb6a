"""Folders of pictures by class, in torchvision's layout (`ImageFolder`), such as ImageNet's validation set."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch

from m2_encoder.data.shards.names import walk_files
from m2_encoder.errors import UserError, name_some
from m2_encoder.evaluation.sets.base import Classes, EvaluationSet
from m2_encoder.evaluation.sets.labels import (
    count_classes,
    make_classes,
    name_folders,
    read_class_index,
    read_folder_names,
    read_names,
)
from m2_encoder.evaluation.sets.layouts import expect
from m2_encoder.evaluation.sets.pictures import FilePictures, is_picture
from m2_encoder.evaluation.sets.published import compare_size
from m2_encoder.evaluation.sets.texts import find_language

_CLASS_INDEX: Final = "imagenet_class_index.json"


def read_image_folder(
    path: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | Mapping[str, str] | None = None,
    name: str | None = None,
) -> EvaluationSet:
    """Read a folder of classes; their numbers are those of the folders' names in sorted order.

    Args:
        path: of the folder that holds one folder for each class.
        labels: names of the classes. A file: one name a line in the order of the folders; a folder and its names a line
            (see `labels.read_folder_names`); or ImageNet's class index (.json). Or such files by language, of one name
            a line each. None takes `imagenet_class_index.json` beside, or else the names of the folders.
        name: in tables; by default that of the folder.

    Raises:
        UserError: for another layout, a folder without a picture, and names that do not fit the folders.
    """
    root = expect(path, "image_folder")
    found = list_classes(root)
    pictures = [picture for files in found.values() for picture in files]
    targets = torch.tensor([number for number, files in enumerate(found.values()) for _ in files])
    classes = _name_classes(root, list(found), targets, labels)
    return compare_size(
        EvaluationSet(
            name=name or root.resolve().name,
            pictures=FilePictures(root, pictures),
            classes=classes,
            source=str(root),
            counts={"pictures": len(pictures), **count_classes(classes)},
        )
    )


def list_classes(root: Path) -> dict[str, list[str]]:
    """The pictures of each folder, with all below it, as paths from `root`; folders and pictures are sorted.

    Raises:
        UserError: for folders without a picture, or no folder at all.
    """
    found: dict[str, list[str]] = {}
    folders = sorted(each.name for each in os.scandir(root) if each.is_dir() and not each.name.startswith("."))
    for folder in folders:
        found[folder] = [
            os.path.relpath(os.path.join(parent, file), root).replace(os.sep, "/")
            for parent, files in sorted(walk_files(root / folder))
            for file in files
            if is_picture(file)
        ]
    if empty := [folder for folder, files in found.items() if not files]:
        raise UserError(f"{root}: no picture in {len(empty):,} of {len(found):,} folders: {name_some(empty, 3)}")
    if not found:
        raise UserError(f"{root}: no folder in it; wanted one for each class")
    return found


def _name_classes(
    root: Path, folders: Sequence[str], targets: torch.Tensor, labels: str | os.PathLike[str] | Mapping[str, str] | None
) -> Classes:
    beside = [each / _CLASS_INDEX for each in (root, root.parent) if (each / _CLASS_INDEX).is_file()]
    if labels is None and not beside:
        return make_classes("names of folders", name_folders(folders, str(root)), targets, where=str(root))
    if isinstance(labels, Mapping):
        files = {language: Path(file).expanduser() for language, file in labels.items()}
        names = {language: _in_order(file, folders) for language, file in files.items()}
        label_set = " + ".join(file.name for file in files.values())
        return make_classes(label_set, names, targets, where=", ".join(labels.values()))
    file = Path(labels).expanduser() if labels is not None else beside[0]
    if not file.is_file():
        raise UserError("no such file", key="labels", value=str(file))
    return make_classes(file.name, _read_labels(file, folders), targets, where=str(file))


def _read_labels(file: Path, folders: Sequence[str]) -> Mapping[str, Sequence[str]]:
    if file.suffix == ".json":
        names = _in_order(file, folders)
        return {find_language(names, str(file)): names}
    lines = read_names(file)
    if any(_first_cell(line) in set(folders) for line in lines):
        return read_folder_names(file, folders)
    names = _in_order(file, folders)
    return {find_language(names, str(file)): names}


def _in_order(file: Path, folders: Sequence[str]) -> tuple[str, ...]:
    """One name for each folder, of a list or a class index."""
    if file.suffix == ".json":
        index = read_class_index(file)
        if missing := [folder for folder in folders if folder not in index]:
            raise UserError(f"{file}: does not have the folders {name_some(missing, 3)}; it is of another set")
        if len(index) != len(folders):
            raise UserError(f"{file}: has {len(index):,} classes, {len(folders):,} folders are there")
        return tuple(index[folder] for folder in folders)
    names = read_names(file)
    if len(names) != len(folders):
        raise UserError(
            f"{file}: has {len(names):,} names, {len(folders):,} folders are there; wanted one name a line in the "
            "order of the folders, or lines such as folder<TAB>name"
        )
    return names


def _first_cell(line: str) -> str:
    return (line.partition("\t") if "\t" in line else line.replace("，", ",").partition(","))[0].strip()
