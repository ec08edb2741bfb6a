"""Chinese-CLIP's folders of the ELEVATER benchmark: `label_cn.txt`, `label.txt`, `test/000`, `test/001`, ….

A folder's name is the number of its class, whatever order folders sort in.
Source: zeroshot_dataset_en.md of github.com/OFA-Sys/Chinese-CLIP.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import torch

from m2_encoder.errors import UserError, name_some
from m2_encoder.evaluation.sets.base import EvaluationSet
from m2_encoder.evaluation.sets.image_folder import list_classes
from m2_encoder.evaluation.sets.labels import count_classes, make_classes, read_names
from m2_encoder.evaluation.sets.layouts import expect
from m2_encoder.evaluation.sets.pictures import FilePictures
from m2_encoder.evaluation.sets.published import compare_size

_LABELS: Final = {"zh": "label_cn.txt", "en": "label.txt"}


def read_elevater_cn(path: str | os.PathLike[str], *, split: str = "test", name: str | None = None) -> EvaluationSet:
    """Read a set of the benchmark.

    Args:
        path: of its folder.
        split: folder of the classes.
        name: in tables; by default that of the folder.

    Raises:
        UserError: for another layout, a folder that is no number, or lists of names that are longer or shorter than
            there are folders.
    """
    root = expect(path, "elevater_cn")
    folder = root / split
    names = {language: read_names(root / file) for language, file in _LABELS.items() if (root / file).is_file()}
    lengths = {language: len(own) for language, own in names.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{root}: label_cn.txt has {lengths['zh']:,} names, label.txt {lengths['en']:,}; one is wrong")
    pictures: list[str] = []
    targets: list[int] = []
    found = {_number(each, folder): files for each, files in list_classes(folder).items()}
    if sorted(found) != list(range(len(next(iter(names.values()))))):
        raise UserError(
            f"{folder}: holds {len(found):,} folders, {min(found)} to {max(found)}, but the list has "
            f"{next(iter(lengths.values())):,} names; each name needs the folder of its number, counted from 0"
        )
    for number, files in sorted(found.items()):
        pictures += files
        targets += [number] * len(files)
    own_name = name or root.resolve().name
    label_set = f"{own_name}/{' + '.join(_LABELS[language] for language in names)}"
    classes = make_classes(label_set, names, torch.tensor(targets), where=str(root))
    return compare_size(
        EvaluationSet(
            name=own_name,
            pictures=FilePictures(folder, pictures),
            classes=classes,
            source=str(root),
            counts={"pictures": len(pictures), **count_classes(classes)},
        )
    )


def _number(name: str, folder: Path) -> int:
    if not name.isdecimal():
        raise UserError(f"{folder}: its folder {name_some([name])} is no number of a class; wanted 000, 001 and so on")
    return int(name)
