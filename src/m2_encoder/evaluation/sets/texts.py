"""Texts of sets: files that are read with one clear error, and rows with their pairs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2_encoder.data.samples.language import describe_languages, detect_language
from m2_encoder.data.samples.parse import SampleProblem, decode_text
from m2_encoder.errors import UserError, abridge
from m2_encoder.evaluation.sets.base import Texts

_TOLD_BY_SCRIPT = ("zh", "en", "ja", "ko")
_SURE = 0.9  # share of texts in one script that tells the language of all
_SHOWN = 60  # characters of a line in a message


def read_text(path: Path) -> str:
    """The content of a text file: UTF-8, with or without a byte order mark, or UTF-16 with one.

    Raises:
        UserError: if it cannot be read, or is in another encoding.
    """
    try:
        return decode_text(path.read_bytes(), "the file")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except SampleProblem as problem:
        raise UserError(f"{path}: {problem.detail}") from problem


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without blanks around them; blank lines at its end are dropped.

    Raises:
        UserError: as `read_text`; for a file without a line.
    """
    lines = [line.strip() for line in read_text(path).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise UserError(f"{path}: is empty; wanted one entry a line")
    return lines


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        UserError: as `read_text`; if it is no JSON, such as half of it.
    """
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: is no JSON: {error}; download it again") from error


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON lines file, each with its place for messages; blank lines are passed over.

    Raises:
        UserError: as `read_text`; for a line that is no JSON object.
    """
    is_empty = True
    for number, line in enumerate(_read_bytes(path), start=1):
        where = f"{path}, line {number}"
        try:
            text = decode_text(line, "it").strip()
            row = json.loads(text) if text else {}
        except SampleProblem as problem:
            raise UserError(f"{where}: {problem.detail}") from problem
        except ValueError as error:
            raise UserError(f"{where}: is no JSON: {error}; download the file again") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: holds {abridge(text, _SHOWN)}; wanted a JSON object")
        if text:
            yield where, row
            is_empty = False
    if is_empty:
        raise UserError(f"{path}: is empty; wanted a JSON object a line")


def _read_bytes(path: Path) -> Iterator[bytes]:
    """The lines of a file, one at a time."""
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def find_language(rows: Sequence[str], where: str) -> str:
    """The language of texts by their script: "zh", "ja", "ko", and "en" for Latin letters, whatever they spell.

    Raises:
        UserError: if they are mixed, or in another script.
    """
    counts = Counter(map(detect_language, rows))
    language, count = counts.most_common(1)[0]
    if count < _SURE * len(rows) or language not in _TOLD_BY_SCRIPT:
        raise UserError(f"{where}: by script, {describe_languages(counts)}; say which it is, such as language=zh")
    return language


def make_texts(rows: Sequence[str], pictures: Sequence[int]) -> Texts:
    """Texts of which each has one picture; `pictures` are their numbers, in the order of the texts."""
    return Texts(tuple(rows), pair_rows(range(len(rows)), pictures))


def pair_rows(texts: Sequence[int], pictures: Sequence[int]) -> Tensor:
    """Pairs of a text and a picture, (P, 2) int64."""
    return torch.tensor([*zip(texts, pictures, strict=True)], dtype=torch.int64).reshape(-1, 2)


def count_texts(texts: Mapping[str, Texts]) -> dict[str, Any]:
    """Counts for records: texts, and those whose words another text of the same language has, too."""
    repeated = {
        language: sum(count for count in Counter(found.rows).values() if count > 1) for language, found in texts.items()
    }
    return {
        "texts": {language: len(found.rows) for language, found in texts.items()},
        "equal_texts": {language: count for language, count in repeated.items() if count},
    }
