"""Names of classes, from the user's files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from m2_encoder.data.samples.language import detect_language, read_language
from m2_encoder.errors import UserError, name_some
from m2_encoder.evaluation.sets.base import Classes
from m2_encoder.evaluation.sets.texts import find_language, read_json, read_lines

_FOLDER_WORDS = frozenset(("folder", "class", "name", "label", "文件夹", "类别", "目录"))
_WORDNET = re.compile(r"n\d{8}")
_SHOWN = 3


def read_names(path: Path) -> tuple[str, ...]:
    """Names of classes, one a line, in the order of their numbers.

    Raises:
        UserError: if it cannot be read; for a blank line, which would shift all that follow.
    """
    names = tuple(read_lines(path))
    if "" in names:
        raise UserError(f"{path}: line {names.index('') + 1} is blank; wanted the name of a class in each line")
    return names


def read_class_index(path: Path) -> dict[str, str]:
    """Names of ImageNet's classes by folder, in their order: {"0": ["n01440764", "tench"], …}.

    Raises:
        UserError: for a file of another form, or with a gap in its numbers.
    """
    value = read_json(path)
    try:
        found = {int(number): (str(entry[0]), str(entry[1])) for number, entry in value.items()}
    except (AttributeError, ValueError, LookupError, TypeError):
        found = {}
    if not found or sorted(found) != list(range(len(found))):
        raise UserError(f'{path}: is no class index; wanted {{"0": ["n01440764", "tench"], "1": …}} without a gap')
    return {folder: name.replace("_", " ") for _, (folder, name) in sorted(found.items())}


def read_folder_names(path: Path, folders: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Names of folders by language, in the order of `folders`.

    Each line is a folder and its names, separated by tabs, or by commas where there is no tab. Chinese and English are
    told apart by their script; a first line such as `folder<TAB>zh<TAB>en` says which column is which.

    Raises:
        UserError: for a folder without a line, a line without a folder, and a name that is missing in some language.
    """
    rows = [_split(line) for line in read_lines(path)]
    languages: list[str] | None = None
    if rows[0][0].casefold() in _FOLDER_WORDS and rows[0][0] not in folders:
        languages = [read_language(cell) or cell for cell in rows[0][1:]]
        rows = rows[1:]
    names: dict[str, dict[str, str]] = {}
    for row in rows:
        own = names.setdefault(row[0], {})
        for column, cell in enumerate(filter(None, row[1:])):
            language = languages[column] if languages and column < len(languages) else detect_language(cell)
            if language in own:
                raise UserError(f"{path}: {row[0]} has two names in {language}: {own[language]} and {cell}; keep one")
            own[language] = cell
    _check_folders(path, names, folders)
    found = {language: tuple(names[each].get(language, "") for each in folders) for language in _languages(names)}
    for language, own_names in found.items():
        if lacking := [each for each, name in zip(folders, own_names, strict=True) if not name]:
            raise UserError(
                f"{path}: {len(lacking):,} of {len(folders):,} folders have no name in {language}: "
                f"{name_some(lacking, _SHOWN)}; a line is a folder, its Chinese and its English name"
            )
    return found


def name_folders(folders: Sequence[str], where: str) -> dict[str, tuple[str, ...]]:
    """The names of folders as names of classes.

    Raises:
        UserError: for folders that are called by WordNet's ids or by numbers.
    """
    if all(_WORDNET.fullmatch(each) or each.isdecimal() for each in folders):
        raise UserError(
            f"{where}: its folders are called {name_some(folders, _SHOWN)}, which no model knows; give names with "
            "labels=FILE: one a line, a class index (.json), or a folder and its names a line"
        )
    names = tuple(each.replace("_", " ") for each in folders)
    return {find_language(names, where): names}


def make_classes(
    label_set: str,
    names: Mapping[str, Sequence[str]],
    targets: Tensor,
    *,
    where: str,
    templates: Mapping[str, tuple[str, ...]] | None = None,
) -> Classes:
    """Classes, once names and targets fit each other.

    Raises:
        UserError: if there are fewer names than classes.
    """
    last = int(targets.max()) if targets.ndim == 1 else targets.shape[1] - 1
    for language, own in names.items():
        is_short = len(own) <= last if targets.ndim == 1 else len(own) != last + 1
        if is_short or int(targets.min()) < 0:
            raise UserError(
                f"{where}: {len(own):,} names in {language}, but the pictures' classes go from "
                f"{int(targets.min()) if targets.ndim == 1 else 0} to {last}; give the list that belongs to this set"
            )
    return Classes(label_set, {each: tuple(own) for each, own in names.items()}, targets, templates or {})


def count_classes(classes: Classes) -> dict[str, Any]:
    """Counts for records: classes, those without a picture, and names that two classes share."""
    number = max(map(len, classes.names.values()))
    targets = classes.targets
    used = len(set(targets.tolist())) if targets.ndim == 1 else int(targets.any(dim=0).sum())
    shared = {
        language: sum(count for name, count in Counter(own).items() if name and count > 1)
        for language, own in classes.names.items()
    }
    return {
        "classes": number,
        "classes_without_pictures": number - used,
        "equal_names": {language: count for language, count in shared.items() if count},
    }


def _split(line: str) -> list[str]:
    separator = "\t" if "\t" in line else ","
    return [cell.strip() for cell in line.replace("，", ",").split(separator)]


def _languages(names: Mapping[str, Mapping[str, str]]) -> list[str]:
    return list(dict.fromkeys(language for own in names.values() for language in own))


def _check_folders(path: Path, names: Mapping[str, object], folders: Sequence[str]) -> None:
    if lacking := [each for each in folders if each not in names]:
        raise UserError(f"{path}: no line for {len(lacking):,} folders: {name_some(lacking, _SHOWN)}")
    if unknown := [each for each in names if each not in set(folders)]:
        raise UserError(f"{path}: lines for {len(unknown):,} folders that are not there: {name_some(unknown, _SHOWN)}")
