"""`m2-search query` and `m2-search similar`: the pictures of an index that fit words, pictures, or both."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from m2_encoder.bounds import Count, Text
from m2_encoder.config.check import check_settings
from m2_encoder.config.model_choice import device_of, is_model_name, model_problems, runtime_problems, takes_files
from m2_encoder.config.output import say
from m2_encoder.config.paths import find_path
from m2_encoder.config.problems import UNSET, find_problems
from m2_encoder.errors import Problem, UserError, abridge
from m2_encoder.evaluation.models.base import EvaluatedModel
from m2_encoder.picture_search.contact_sheet import MAX_PICTURES, Cell, Section, draw_sheet
from m2_encoder.picture_search.index import PictureIndex, open_index
from m2_encoder.picture_search.model import Runtime, open_index_model
from m2_encoder.picture_search.query import Term, encode_query, parse_query
from m2_encoder.picture_search.results import (
    Results,
    cut_tail,
    find_results,
    find_row,
    is_picture,
    json_of,
    read_picture,
    table_of,
)

Format = Literal["table", "paths", "json"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShownSettings:
    """The keys of all that show pictures of an index; `conf/commands/search_*.yaml` say what they mean."""

    index: Text
    format: Format
    sheet: Text | None
    overwrite: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class _RankedSettings(ShownSettings):
    top: Count
    tail: bool
    model: Any
    weights: Any
    tokenizer: Any
    device: Any
    runtime: Runtime


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuerySettings(_RankedSettings):
    """The keys of m2-search query."""

    query: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimilarSettings(_RankedSettings):
    """The keys of m2-search similar."""

    picture: Text


def check_query(cfg: dict[str, Any]) -> list[Problem]:
    """Problems of a configuration of m2-search query, before the model is loaded."""
    problems = [*check_settings(QuerySettings, cfg), *_ranked_problems(cfg)]
    if isinstance(cfg["query"], str):
        knows_index = all(problem.key != "index" for problem in problems)
        try:
            _read_query(cfg["query"], open_index(find_path(cfg["index"])) if knows_index else None)
        except UserError as error:
            problems += find_problems(error)
    return problems


def run_query(cfg: dict[str, Any]) -> int:
    """Prints what a query finds.

    Raises:
        UserError: for a picture that cannot be used, and another model than that of the index.
    """
    index = open_index(find_path(cfg["index"]))
    return _show(cfg, index, _read_query(cfg["query"], index))


def _read_query(query: str, index: PictureIndex | None) -> list[Term]:
    return parse_query(query) if index is None else parse_query(query, is_picture=partial(is_picture, index))


def check_similar(cfg: dict[str, Any]) -> list[Problem]:
    """Problems of a configuration of m2-search similar, before the model is loaded."""
    return [*check_settings(SimilarSettings, cfg), *_ranked_problems(cfg)]


def run_similar(cfg: dict[str, Any]) -> int:
    """Prints the pictures that are most like one.

    Raises:
        UserError: as `run_query`.
    """
    index = open_index(find_path(cfg["index"]))
    try:
        return _show(cfg, index, [Term(1.0, "picture", cfg["picture"])])
    except UserError as error:
        raise error if error.key != "query" else UserError(error.text, key="picture") from error


def shown_problems(cfg: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with `index` and `sheet`."""
    problems = []
    if isinstance(cfg["index"], str):
        try:
            open_index(find_path(cfg["index"]))
        except UserError as error:
            problems.append(Problem("index", cfg["index"], " ".join(error.text.split())))
    sheet = cfg["sheet"]
    if isinstance(sheet, str):
        path = Path(sheet).expanduser()
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if path.suffix.lower() != ".png":
            problems.append(Problem("sheet", sheet, "must end in .png"))
        elif path.is_dir():
            problems.append(Problem("sheet", sheet, "is a folder", "give the name of a file"))
        elif path.exists() and cfg["overwrite"] is not True:
            problems.append(Problem("sheet", sheet, "exists", "choose another name, or replace it with overwrite=true"))
        elif not takes_files(folder):
            problems.append(Problem("sheet", sheet, f"cannot be written: {folder} is no folder that you may write to"))
    return problems


def _ranked_problems(cfg: Mapping[str, Any]) -> list[Problem]:
    problems = shown_problems(cfg)
    if cfg["model"] is None:
        given = [key for key in ("weights", "tokenizer") if cfg[key] is not None]
        problems += [Problem(key, cfg[key], "belongs to a model; add model=") for key in given]
        problems += [each for each in model_problems({**cfg, "model": UNSET}) if each.key == "device"]
    else:
        problems += model_problems(cfg)
    if problems or not isinstance(cfg["index"], str):
        return problems
    return runtime_problems(cfg, of_index=open_index(find_path(cfg["index"])).made_by.model)


def _show(cfg: Mapping[str, Any], index: PictureIndex, terms: list[Term]) -> int:
    rows = {term.content: find_row(index, term.content) for term in terms if term.kind == "picture"}
    if len(terms) == 1 and (row := rows.get(terms[0].content)) is not None:
        feature = np.asarray(index.features[row], dtype=np.float32)  # without the model
    else:
        feature = encode_query(terms, _open_model(cfg, index), picture=lambda name: read_picture(index, name))
    without = [row for row in rows.values() if row is not None]
    query = _describe(terms)
    results = find_results(index, feature, cfg["top"], query=query, without=without)
    results = results if cfg["tail"] else cut_tail(results)
    if cfg["sheet"] is not None:
        _draw(Path(cfg["sheet"]).expanduser(), results, index)
    if cfg["format"] == "json":
        print(json_of(results, index))
    elif cfg["format"] == "paths":
        print(*(index.root / row.name for row in results.rows), sep="\n", end="\n" if results.rows else "")
    else:
        say(f"{abridge(query, 200)}: the first {len(results.rows):,} of {len(index):,} pictures")
        print(table_of(results))
    return 0


def _open_model(cfg: Mapping[str, Any], index: PictureIndex) -> EvaluatedModel:
    model, weights, tokenizer = cfg["model"], cfg["weights"], cfg["tokenizer"]
    return open_index_model(
        index,
        model=model if model is None or is_model_name(model) else find_path(model),
        weights=None if weights is None else find_path(weights),
        tokenizer=None if tokenizer is None else find_path(tokenizer),
        device=device_of(cfg["device"]),
        runtime=cfg["runtime"],
    )


def _describe(terms: list[Term]) -> str:
    """A query as it was read."""
    if len(terms) == 1 and terms[0].weight == 1:
        return terms[0].content
    parts = []
    for number, term in enumerate(terms):
        sign = "- " if term.weight < 0 else "+ " if number else ""
        parts.append(f"{sign}{term._replace(weight=abs(term.weight))}")
    return " ".join(parts)


def _draw(path: Path, results: Results, index: PictureIndex) -> None:
    cells = [Cell(row.name, f"{row.rank}  {row.score:.3f}", row.is_likely) for row in results.rows[:MAX_PICTURES]]
    end = min(results.end, len(cells))
    tail = "probably nothing that fits" if not end else "probably the end"
    sections = [Section("", cells[:end])] + ([Section(tail, cells[end:])] if cells[end:] else [])
    subtitle = f"{len(cells):,} of {len(index):,} pictures   ·   number: rank and cosine   ·   {index.root.name}"
    draw_sheet(path, sections, root=index.root, title=results.query, subtitle=subtitle)
