"""XTD as published: `test_image_names.txt` and `test_1kcaptions_LANGUAGE.txt`, line by line, over COCO's pictures.

The seven languages of the authors lie beside the names, those of others in folders next to that (`MIC`, `STAIR`).
Source: Aggarwal and Kale, Towards Zero-shot Cross-lingual Image Retrieval (arXiv:2012.05107). Captions are translations
of the English ones, except the Japanese ones, which are STAIR's own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from m2_encoder.errors import UserError, name_some
from m2_encoder.evaluation.sets.base import EvaluationSet, Texts
from m2_encoder.evaluation.sets.layouts import expect
from m2_encoder.evaluation.sets.pictures import FilePictures, find_missing, require_files
from m2_encoder.evaluation.sets.published import compare_size
from m2_encoder.evaluation.sets.texts import count_texts, make_texts, read_lines

_NAMES, _CAPTIONS = "test_image_names.txt", "test_1kcaptions_"
_TAGS: Final = {"jp": "ja"}  # their names of languages that have another code
_NOT_TRANSLATED: Final = ("ja",)
_PLACES: Final = ("", "images", "train2014", "val2014")  # where pictures are looked for


def read_xtd(
    path: str | os.PathLike[str],
    *,
    images: str | None = None,
    languages: Sequence[str] | None = None,
    name: str = "xtd",
) -> EvaluationSet:
    """Read the set; line k of each file describes picture k.

    Args:
        path: of the repository, or of the folder with `test_image_names.txt` in it.
        images: folder of the pictures; by default the folder itself, `images`, `train2014` or `val2014` in it.
        languages: which ones, such as ["zh", "en"]; None takes all.
        name: in tables.

    Raises:
        UserError: for another layout, an unknown language, a file of another length, and pictures that are not there.
    """
    root = expect(path, "xtd")
    folder = next(each for each in _folders(root) if (each / _NAMES).is_file())
    pictures = read_lines(folder / _NAMES)
    files = _caption_files(root, folder)
    if unknown := [language for language in languages or () if language not in files]:
        raise UserError(f"{root}: has no {name_some(unknown)}; it has {name_some(sorted(files), 100)}")
    texts = {}
    for language, file in files.items():
        if languages is None or language in languages:
            rows = read_lines(file)
            if len(rows) != len(pictures):
                raise UserError(f"{file}: has {len(rows):,} lines, {_NAMES} has {len(pictures):,}; download both again")
            texts[language] = make_texts(rows, range(len(rows)))
    return compare_size(
        EvaluationSet(
            name=name,
            pictures=FilePictures(_find_images(root, folder, images, pictures), pictures),
            texts=texts,
            parallel=_translations(texts),
            source=str(root),
            counts={"pictures": len(pictures), **count_texts(texts)},
        )
    )


def _folders(root: Path) -> list[Path]:
    return [root, *sorted(each for each in root.iterdir() if each.is_dir())]


def _caption_files(root: Path, folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for place in dict.fromkeys([folder, *_folders(root), *_folders(folder.parent)]):
        for file in sorted(place.glob(f"{_CAPTIONS}*.txt")):
            tag = file.stem.removeprefix(_CAPTIONS)
            found.setdefault(_TAGS.get(tag, tag), file)
    return found


def _translations(texts: Mapping[str, Texts]) -> dict[tuple[str, str], Tensor]:
    if "en" not in texts:
        return {}
    same = torch.arange(len(texts["en"].rows)).repeat(2, 1).T
    return {(each, "en"): same for each in texts if each not in ("en", *_NOT_TRANSLATED)}


def _find_images(root: Path, folder: Path, images: str | None, pictures: Sequence[str]) -> Path:
    places = [Path(images).expanduser()] if images else [each / name for each in (root, folder) for name in _PLACES]
    found = next((each for each in places if not find_missing(each, pictures[:1])), places[0])
    require_files(found, pictures, listed_by=_NAMES)
    return found
