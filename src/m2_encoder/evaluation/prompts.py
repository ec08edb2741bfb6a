"""Texts for classes: names put into templates, in Chinese and English.

The package holds three families of templates of its own writing, `assets/prompts/<language>.<family>.txt`. Published
ones, such as the eighty of CLIP, are read from the user's file: one a line, with `{}` or `{c}` for the name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias, get_args

from m2_encoder.errors import UserError, abridge
from m2_encoder.evaluation.sets.texts import read_lines

PLACE: Final = "{}"
"""Where the name of a class goes in a template."""

Family: TypeAlias = Literal["general", "drawings", "photos", "none"]
FAMILIES: Final = get_args(Family)
"""Templates that the package has; those of "none" are the name alone."""

PROMPT_LANGUAGES: Final = ("zh", "en")
"""Languages that the families are in."""

_ONLY_NAME: Final = (PLACE,)
_OTHER_PLACES: Final = ("{c}", "{label}", "{class}", "{0}")  # as published files write it
_SHOWN: Final = 80  # characters of a template in a message


class Templates(NamedTuple):
    """Templates of one language."""

    name: str  # the family, or the name of the file; named in every row of results
    rows: tuple[str, ...]  # each with `{}` exactly once


def load_templates(source: str, language: str) -> Templates:
    """Templates of a family of the package, or of the user's file.

    Args:
        source: one of `FAMILIES`, or the path of a file.
        language: of the class names, as a tag such as "zh_TW"; a family must have it, of a file it is not asked.

    Raises:
        UserError: for a family that lacks the language, a file that cannot be read, and what `check_templates` refuses.
    """
    if source == "none":
        return Templates("none", _ONLY_NAME)
    if source not in FAMILIES:
        path = Path(source).expanduser()
        if not path.is_file():
            raise UserError(f"no such family or file; choose {', '.join(FAMILIES)}, or a file", value=source)
        return Templates(path.stem, check_templates(read_lines(path), str(path)))
    plain = language.replace("-", "_").partition("_")[0]
    if plain not in PROMPT_LANGUAGES:
        raise UserError(
            f"the templates {source} are in {' and '.join(PROMPT_LANGUAGES)}, not in {language}; choose none, or a file"
        )
    content = files("m2_encoder").joinpath("assets", "prompts", f"{plain}.{source}.txt").read_text(encoding="utf-8")
    return Templates(source, check_templates(content.splitlines(), source))


def check_templates(rows: Sequence[str], where: str) -> tuple[str, ...]:
    """Templates with `{}` for the name, however their source writes that; one that comes twice counts twice.

    Raises:
        UserError: for one that has no place for a name, or several, by its line; for none.
    """
    found = []
    for number, row in enumerate(rows, start=1):
        plain = row.strip()
        for other in _OTHER_PLACES:
            plain = plain.replace(other, PLACE)
        if plain.count(PLACE) != 1:
            raise UserError(
                f"{where}, line {number}: {abridge(row, _SHOWN)!r} has {plain.count(PLACE)} places for a name; wanted "
                "{} (or {c}) exactly once"
            )
        found.append(plain)
    if not found:
        raise UserError(f"{where}: no template in it; wanted one a line, with {{}} for the name")
    return tuple(found)


def expand(names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """The texts of each class: its name in every template, in their order; C lists of K texts.

    >>> expand(["a cat", "{x}"], ["{}", "here is {}."])
    [['a cat', 'here is a cat.'], ['{x}', 'here is {x}.']]
    """
    return [[template.replace(PLACE, name, 1) for template in templates] for name in names]


def digest_texts(names: Sequence[str], language: str, templates: Sequence[str]) -> str:
    """SHA-256 of all that makes the texts of classes, as 64 hex digits: what cached class vectors belong to.

    Order counts. Names of label sets do not: equal names in equal templates are equal texts.
    """
    content = json.dumps([list(names), language, list(templates)], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()
