"""Runs evaluation tasks, and prints and writes their results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2_encoder.errors import Problem, UserError, abridge, under
from m2_encoder.evaluation.tables import CellTable, print_cells, print_table
from m2_encoder.evaluation.tasks.base import EvaluationContext, EvaluationTask, TaskResult
from m2_encoder.files import write_json, write_text

if TYPE_CHECKING:
    from rich.console import Console

SUMMARY_FILE = "summary.json"
TABLE_FILE = "results.md"


def prepare_tasks(tasks: Mapping[str, EvaluationTask], find: Callable[[str], Path]) -> None:
    """Lets tasks look at what they measure on; `find` gives the place of a path.

    Raises:
        UserError: for what they miss, all of them.
    """
    errors = [error for name, task in tasks.items() if (error := _find_error(name, task, find)) is not None]
    if len(errors) > 1:
        problems = [Problem(each.key or "", each.value, each.text) for each in errors]
        raise UserError("; ".join(map(str, errors)), problems=problems)
    if errors:
        raise errors[0]


def _find_error(name: str, task: EvaluationTask, find: Callable[[str], Path]) -> UserError | None:
    try:
        with under(f"evaluation.{name}"):
            task.prepare(find)
    except UserError as error:
        return error
    return None


def run_tasks(tasks: Mapping[str, EvaluationTask], context: EvaluationContext) -> dict[str, TaskResult]:
    """Results of the tasks that apply to a model, in the order given; call it on one rank.

    Raises:
        UserError: if two tasks give metrics, pictures or entries of `summary.json` the same name.
    """
    results: dict[str, TaskResult] = {}
    owners: dict[str, str] = {}
    for name, task in tasks.items():
        if not task.applies(context):
            continue
        results[name] = found = task.measure(context)
        for key in (*found.metrics, *found.record, *found.pictures):
            if (owner := owners.setdefault(key, name)) != name:
                raise UserError(f"{key} is measured by {owner} and by {name}; choose one of them")
    return results


def summarize(results: Mapping[str, TaskResult]) -> dict[str, Any]:
    """The entries of `summary.json`: `metrics` of all tasks, and their own."""
    summary: dict[str, Any] = {"metrics": {}}
    if records := [each.to_dict() for result in results.values() for each in result.records]:
        summary["records"] = records
    for result in results.values():
        summary["metrics"].update(result.metrics)
        summary |= result.record
    return summary


def write_results(folder: Path, results: Mapping[str, TaskResult], summary: Mapping[str, Any]) -> list[Path]:
    """Writes `results.md`, `summary.json` and pictures to an existing folder, numbers first; returns the pictures."""
    if markdown := "\n".join(result.markdown for result in results.values() if result.markdown):
        write_text(folder / TABLE_FILE, markdown)
    write_json(folder / SUMMARY_FILE, summary)
    pictures = []
    for result in results.values():
        for name, draw in result.pictures.items():
            draw(folder / name)
            pictures.append(folder / name)
    return pictures


def print_results(console: Console, results: Mapping[str, TaskResult], context: EvaluationContext) -> None:
    """Prints tables and lines."""
    num_images = {name: len(dataset.keys) for name, dataset in context.sets.items()}
    for result in results.values():
        for row in result.rows:
            if isinstance(row, CellTable):
                console.print()
                print_cells(console, row)
            elif isinstance(row, str):
                console.print(abridge(row), soft_wrap=True, highlight=False)
            else:
                console.print()
                print_table(console, row, num_images=num_images, titles=context.titles)
