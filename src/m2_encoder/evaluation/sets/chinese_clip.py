"""Chinese-CLIP's pairs of files: `SPLIT_imgs.tsv` (id, base64) and `SPLIT_texts.jsonl` (text_id, text, image_ids).

MUGE, Flickr30K-CN and COCO-CN come so. Source: the data format of github.com/OFA-Sys/Chinese-CLIP.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m2_encoder.errors import UserError, name_some
from m2_encoder.evaluation.sets.base import EvaluationSet, Texts
from m2_encoder.evaluation.sets.layouts import expect
from m2_encoder.evaluation.sets.pictures import PartPictures
from m2_encoder.evaluation.sets.published import compare_size
from m2_encoder.evaluation.sets.texts import count_texts, find_language, pair_rows, read_json_lines

_PICTURES, _TEXTS = "_imgs.tsv", "_texts.jsonl"
_SHOWN = 3


def read_chinese_clip(
    path: str | os.PathLike[str], *, split: str | None = None, name: str | None = None, language: str | None = None
) -> EvaluationSet:
    """Read a pair of files. Every text is a query; all pictures of the first file are the gallery.

    Args:
        path: of the folder, or of one of the two files.
        split: which pair of the folder, such as "valid"; None if there is one.
        name: in tables; by default that of the folder.
        language: of the texts; None tells it by their script.

    Raises:
        UserError: for another layout, a split without answers, a file that is cut, an id that comes twice, and a text
            that names a picture which is not there.
    """
    root = expect(path, "chinese_clip")
    stem = _find_pair(root, split)
    pictures_file, texts_file = Path(f"{stem}{_PICTURES}"), Path(f"{stem}{_TEXTS}")
    ids, pictures = _index(pictures_file)
    texts = _read_texts(texts_file, pictures_file, ids)
    by_language = {language or find_language(texts.rows, str(texts_file)): texts}
    without = len(ids) - len(texts.pairs[:, 1].unique())
    return compare_size(
        EvaluationSet(
            name=name or stem.parent.resolve().name,
            pictures=pictures,
            texts=by_language,
            source=str(pictures_file),
            counts={"pictures": len(ids), **count_texts(by_language), "pictures_without_text": without},
        )
    )


def _find_pair(root: Path, split: str | None) -> Path:
    """What the names of both files start with."""
    if root.is_file():
        stem = root.name.removesuffix(_PICTURES).removesuffix(_TEXTS)
        splits, folder = [stem], root.parent
    else:
        folder = root
        splits = sorted(file.name.removesuffix(_PICTURES) for file in root.glob(f"*{_PICTURES}"))
        splits = [each for each in splits if split in (None, each)]
    if len(splits) != 1:
        there = sorted(file.name for file in folder.glob(f"*{_PICTURES}"))
        what = f"no split {split}" if split else "several splits"
        raise UserError(f"{root}: {what} among {name_some(there)}; choose one with split=NAME")
    for ending in (_PICTURES, _TEXTS):
        if not (folder / f"{splits[0]}{ending}").is_file():
            raise UserError(f"{folder}: {splits[0]}{ending} is not there; both files belong together")
    return folder / splits[0]


def _index(file: Path) -> tuple[dict[str, int], PartPictures]:
    """Numbers of pictures by id, and the pictures: only where each lies is kept."""
    ids: dict[str, int] = {}
    parts: list[tuple[int, int, int]] = []
    offset = 0
    with file.open("rb") as content:
        for number, line in enumerate(content, start=1):
            start, offset = offset, offset + len(line)
            body = line.rstrip(b"\r\n")
            if not body:
                continue
            key, tab, encoded = body.partition(b"\t")
            if not tab or not encoded:
                raise UserError(f"{file}, line {number}: wanted id<TAB>base64; this is {body[:20]!r} without that")
            if len(encoded.strip()) % 4:
                raise UserError(f"{file}, line {number}: its base64 is cut; download the file again")
            name = key.removeprefix(codecs.BOM_UTF8).decode("utf-8", "backslashreplace").strip()
            if name in ids:
                raise UserError(f"{file}, line {number}: picture {name} comes twice")
            ids[name] = len(ids)
            parts.append((0, start + len(key) + 1, len(encoded)))
    if not ids:
        raise UserError(f"{file}: is empty; a line is id<TAB>base64")
    return ids, PartPictures(tuple(ids), [str(file)], np.array(parts, np.int64), base64=True)


def _read_texts(file: Path, pictures_file: Path, ids: Mapping[str, int]) -> Texts:
    rows: list[str] = []
    texts: list[int] = []
    pictures: list[int] = []
    seen: set[str] = set()
    unanswered: list[str] = []
    missing: list[str] = []
    for where, row in read_json_lines(file):
        key, text, answers = _parse(row, where)
        if key in seen:
            raise UserError(f"{where}: text {key} comes twice")
        seen.add(key)
        if not answers:
            unanswered.append(key)
        missing += [f"{answer} of text {key}" for answer in answers if answer not in ids]
        known = [ids[answer] for answer in dict.fromkeys(answers) if answer in ids]
        texts += [len(rows)] * len(known)
        pictures += known
        rows.append(text)
    if len(unanswered) == len(rows):
        raise UserError(f"{file}: no text has image_ids: a test split without answers; evaluate the split valid")
    if unanswered:
        raise UserError(f"{file}: {len(unanswered):,} texts have no image_ids: {name_some(unanswered, _SHOWN)}")
    if missing:
        raise UserError(
            f"{file}: {len(missing):,} image_ids are not in {pictures_file.name}: {name_some(missing, _SHOWN)}; are "
            "both files of one split, and whole?"
        )
    return Texts(tuple(rows), pair_rows(texts, pictures))


def _parse(row: dict[str, Any], where: str) -> tuple[str, str, list[str]]:
    key, text, answers = row.get("text_id"), row.get("text"), row.get("image_ids", [])
    if key is None or not isinstance(text, str) or not isinstance(answers, list):
        raise UserError(f"{where}: has {name_some(list(row))}; wanted text_id, text and a list image_ids")
    return str(key), text, [str(answer) for answer in answers]
