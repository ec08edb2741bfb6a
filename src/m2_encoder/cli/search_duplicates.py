"""`m2-search duplicates`: groups of near-equal pictures of an index."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

from annotated_types import Ge, Le
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from m2_encoder.cli.search_query import ShownSettings, shown_problems
from m2_encoder.config.check import check_settings
from m2_encoder.config.output import say
from m2_encoder.config.paths import find_path
from m2_encoder.errors import Problem, abridge
from m2_encoder.picture_search.contact_sheet import Cell, Section, draw_sheet
from m2_encoder.picture_search.duplicates import Group, find_duplicates
from m2_encoder.picture_search.index import PictureIndex, open_index

_DRAWN: Final = 60  # pictures of a sheet; groups take a row each


@dataclasses.dataclass(frozen=True, kw_only=True)
class DuplicatesSettings(ShownSettings):
    """The keys of m2-search duplicates."""

    threshold: Annotated[float, Ge(0.5), Le(1)]


def check_duplicates(cfg: dict[str, Any]) -> list[Problem]:
    """Problems of a configuration of m2-search duplicates."""
    return [*check_settings(DuplicatesSettings, cfg), *shown_problems(cfg)]


def run_duplicates(cfg: dict[str, Any]) -> int:
    """Prints the groups."""
    index = open_index(find_path(cfg["index"]))
    columns = (TextColumn("comparing pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        groups = find_duplicates(
            index, cfg["threshold"], report=lambda done, total: progress.update(task, completed=done, total=total)
        )
    if cfg["sheet"] is not None:
        _draw(Path(cfg["sheet"]).expanduser(), index, groups, cfg["threshold"])
    if cfg["format"] == "json":
        content = [{"least": group.least, "names": [index.names[row] for row in group.rows]} for group in groups]
        print(json.dumps({"root": str(index.root), "groups": content}, ensure_ascii=False, indent=1))
    elif cfg["format"] == "paths":
        paths = [index.root / index.names[row] for group in groups for row in group.rows[1:]]
        print(*paths, sep="\n", end="\n" if paths else "")
    else:
        more = sum(len(group.rows) - 1 for group in groups)
        say(f"{len(groups):,} groups of near-equal pictures, {more:,} more than one of each")
        for number, group in enumerate(groups, start=1):
            print(f"\ngroup {number:,}, cosine {group.least:.3f} and above")
            print(
                *(f"  {index.sizes[row]:>12,} bytes  {abridge(index.names[row], 200)}" for row in group.rows), sep="\n"
            )
    return 0


def _draw(path: Path, index: PictureIndex, groups: Sequence[Group], threshold: float) -> None:
    sections: list[Section] = []
    left = _DRAWN
    for number, group in enumerate(groups, start=1):
        rows, left = group.rows[:left], left - len(group.rows)
        sections.append(Section(f"group {number:,}, cosine {group.least:.3f}", [_cell(index, row) for row in rows]))
        if left <= 0:
            break
    subtitle = f"{len(sections):,} of {len(groups):,} groups, cosine {threshold:g} and above   ·   {index.root.name}"
    draw_sheet(path, sections, root=index.root, title="near-equal pictures", subtitle=subtitle)


def _cell(index: PictureIndex, row: int) -> Cell:
    return Cell(index.names[row], f"{index.sizes[row]:,} B")
