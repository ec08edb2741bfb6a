"""Babel-ImageNet's names of ImageNet's classes in many languages: {LANGUAGE: [[class indices], [names]]}.

A language has names for some of the classes; it is measured on these, with the pictures of these.
Source: Geigle et al., Babel-ImageNet (arXiv:2306.08658). Its names may not be used commercially, and are not shipped.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from m2_encoder.errors import UserError, name_some
from m2_encoder.evaluation.sets.base import Classes, EvaluationSet
from m2_encoder.evaluation.sets.image_folder import list_classes
from m2_encoder.evaluation.sets.labels import count_classes, read_names
from m2_encoder.evaluation.sets.layouts import expect
from m2_encoder.evaluation.sets.pictures import FilePictures
from m2_encoder.evaluation.sets.published import compare_size
from m2_encoder.evaluation.sets.texts import read_json


def read_babel_imagenet(
    path: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str],
    languages: Sequence[str] | None = None,
    english: str | None = None,
    name: str = "babel_imagenet",
) -> EvaluationSet:
    """Read the names, over a folder of ImageNet's validation set.

    Classes without a name in a language have the name "" there: they and their pictures are not in its accuracy.

    Args:
        path: of the .json file.
        images: folder with one folder for each of ImageNet's classes.
        languages: which ones, such as ["zh", "de"]; None takes all.
        english: file of the English names, one a line; the published file has none.
        name: in tables.

    Raises:
        UserError: for another layout, an unknown language, and class indices for which there is no folder.
    """
    file, root = expect(path, "babel_imagenet"), expect(images, "image_folder")
    known = {tag.lower(): value for tag, value in _read_object(file).items()}
    if unknown := [tag for tag in languages or () if tag.lower() not in {*known, *(["en"] if english else [])}]:
        raise UserError(f"{file}: has no {name_some(unknown)}; it has {name_some(sorted(known), 100)}")
    found = list_classes(root)
    names = {
        tag: _spread(value, len(found), f"{file}, {tag}")
        for tag, value in known.items()
        if languages is None or tag in {each.lower() for each in languages}
    }
    if english is not None:
        own = read_names(Path(english).expanduser())
        if len(own) != len(found):
            raise UserError(f"{english}: has {len(own):,} names, {len(found):,} folders are in {root}")
        names["en"] = own
    targets = torch.tensor([number for number, files in enumerate(found.values()) for _ in files])
    classes = Classes(file.name, names, targets)
    pictures = FilePictures(root, [picture for files in found.values() for picture in files])
    read = EvaluationSet(name=name, pictures=pictures, classes=classes, source=str(file))
    counts = {"pictures": len(pictures), **count_classes(classes), "classes_named": _count_named(names)}
    return dataclasses.replace(compare_size(read), counts=counts)


def _count_named(names: dict[str, tuple[str, ...]]) -> dict[str, int]:
    return {language: sum(map(bool, own)) for language, own in names.items()}


def _read_object(file: Path) -> dict[str, Any]:
    value = read_json(file)
    if not isinstance(value, dict) or not value:
        raise UserError(f"{file}: holds no languages; wanted {{LANGUAGE: [[class indices], [names]]}}")
    return value


def _spread(value: Any, number: int, where: str) -> tuple[str, ...]:
    try:
        indices, own = value
        pairs = dict(zip(map(int, indices), own, strict=True))
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: wanted [[class indices], [names]] of equal length ({error})") from error
    if not pairs or len(pairs) != len(own) or not all(isinstance(each, str) and each for each in own):
        raise UserError(f"{where}: class indices come twice, or a name is no text")
    if min(pairs) < 0 or max(pairs) >= number:
        raise UserError(f"{where}: class indices from {min(pairs)} to {max(pairs)}, but {number:,} folders are there")
    return tuple(pairs.get(index, "") for index in range(number))
