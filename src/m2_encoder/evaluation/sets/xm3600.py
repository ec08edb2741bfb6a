"""Crossmodal-3600 as published: `captions.jsonl` with captions in 36 languages, and the pictures.

A line is {"image/key": …, "zh": {"caption": ["…"], …}, …}; the picture is `<key>.jpg`.
Source: Thapliyal et al., Crossmodal-3600 (arXiv:2205.12522). Captions of two languages are no translations.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m2_encoder.errors import UserError, name_some
from m2_encoder.evaluation.sets.base import EvaluationSet
from m2_encoder.evaluation.sets.layouts import expect
from m2_encoder.evaluation.sets.pictures import FilePictures, find_missing, require_files
from m2_encoder.evaluation.sets.published import compare_size
from m2_encoder.evaluation.sets.texts import count_texts, make_texts, read_json_lines


def read_xm3600(
    path: str | os.PathLike[str],
    *,
    images: str | None = None,
    languages: Sequence[str] | None = None,
    name: str = "xm3600",
) -> EvaluationSet:
    """Read the set; every caption is a query.

    Args:
        path: of the folder with `captions.jsonl`, or of that file.
        images: folder of the pictures; by default `images` beside the file, or its folder.
        languages: which ones, such as ["zh", "en"]; None takes all.
        name: in tables.

    Raises:
        UserError: for another layout, an unknown language, a picture that comes twice or is not there.
    """
    root = expect(path, "xm3600")
    file = root / "captions.jsonl" if root.is_dir() else root
    keys: dict[str, int] = {}
    rows: dict[str, tuple[list[str], list[int]]] = {}
    for where, row in read_json_lines(file):
        key = str(row.get("image/key", ""))
        if not key or key in keys:
            raise UserError(f"{where}: its image/key {key!r} is empty, or comes twice")
        for language, captions in _captions(row, where).items():
            own = rows.setdefault(language, ([], []))
            own[0].extend(captions)
            own[1].extend([len(keys)] * len(captions))
        keys[key] = len(keys)
    if unknown := [language for language in languages or () if language not in rows]:
        raise UserError(f"{file}: has no {name_some(unknown)}; it has {name_some(sorted(rows), 100)}")
    texts = {each: make_texts(*own) for each, own in rows.items() if languages is None or each in languages}
    pictures = [f"{key}.jpg" for key in keys]
    return compare_size(
        EvaluationSet(
            name=name,
            pictures=FilePictures(_find_images(file, images, pictures), pictures),
            texts=texts,
            source=str(file),
            counts={"pictures": len(pictures), **count_texts(texts)},
        )
    )


def _captions(row: dict[str, Any], where: str) -> dict[str, list[str]]:
    found = {}
    for language, value in row.items():
        if not isinstance(value, dict):
            continue
        captions = value.get("caption")
        if not isinstance(captions, list) or not all(isinstance(each, str) for each in captions):
            raise UserError(f"{where}: {language} has no list of texts as its caption")
        found[language] = captions
    return found


def _find_images(file: Path, images: str | None, pictures: Sequence[str]) -> Path:
    places = [Path(images).expanduser()] if images else [file.parent / "images", file.parent]
    root = next((each for each in places if not find_missing(each, pictures[:1])), places[0])
    require_files(root, pictures, listed_by=str(file))
    return root
