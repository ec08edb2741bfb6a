"""JSON lines of the official release: {"caption": ["…", …], "image": "path"}, a picture a line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from m2_encoder.errors import UserError, name_some
from m2_encoder.evaluation.sets.base import EvaluationSet
from m2_encoder.evaluation.sets.layouts import expect
from m2_encoder.evaluation.sets.pictures import FilePictures, find_missing, require_files
from m2_encoder.evaluation.sets.published import compare_size
from m2_encoder.evaluation.sets.texts import count_texts, find_language, make_texts, read_json_lines


def read_caption_lines(
    path: str | os.PathLike[str], *, images: str | None = None, name: str | None = None, language: str | None = None
) -> EvaluationSet:
    """Read a file of the official evaluation, such as that of Flickr30K-CN.

    Every caption is a query, its picture that of its line; equal captions stay apart (COCO has 272 such rows).

    Args:
        path: of the file.
        images: folder that paths of pictures count from; by default that of the file.
        name: in tables; by default that of the file.
        language: of the captions; None tells it by their script.

    Raises:
        UserError: for another layout, a line of another form, a picture that comes twice or is not there.
    """
    file = expect(path, "caption_lines")
    rows: list[str] = []
    numbers: list[int] = []
    names: dict[str, int] = {}
    for where, row in read_json_lines(file):
        captions, image = _parse(row, where)
        if image in names:
            raise UserError(f"{where}: picture {image} comes twice; put its captions into one line")
        rows += captions
        numbers += [len(names)] * len(captions)
        names[image] = len(names)
    root = _find_root(file, images, list(names))
    texts = {language or find_language(rows, str(file)): make_texts(rows, numbers)}
    return compare_size(
        EvaluationSet(
            name=name or file.stem,
            pictures=FilePictures(root, tuple(names)),
            texts=texts,
            source=str(file),
            counts={"pictures": len(names), **count_texts(texts)},
        )
    )


def _parse(row: dict[str, Any], where: str) -> tuple[list[str], str]:
    captions, image = row.get("caption"), row.get("image")
    captions = [captions] if isinstance(captions, str) else captions
    is_list = isinstance(captions, list) and bool(captions) and all(isinstance(each, str) for each in captions)
    if not isinstance(image, str) or captions is None or not is_list:
        raise UserError(f'{where}: has {name_some(list(row))}; wanted {{"caption": ["…"], "image": "path"}}')
    return captions, image


def _find_root(file: Path, images: str | None, names: list[str]) -> Path:
    root = Path(images).expanduser() if images else file.parent
    if not images and find_missing(root, names[:1]):  # as where annotations have a folder of their own
        root = next((each for each in (file.parent.parent, root / "images") if not find_missing(each, names[:1])), root)
    require_files(root, names, listed_by=str(file))
    return root
